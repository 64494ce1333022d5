"""The policy: a causal language model with a value head."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor, nn

from agents.critic import Critic, build_critic
from agents.policy_files import load_parts, save_policy_files
from agents.slots import Slots, last_positions, masked_hidden, scale_gradient
from agents.value_head import ValueHead
from textenv.logprobs import packed_logprobs, unpack
from textenv.models import Shared, backbone, check_head, disable_dropout, logit_width, output_head
from textenv.packing import packed_hidden

if TYPE_CHECKING:
    from transformers import PretrainedConfig, PreTrainedTokenizerBase


class PolicyOutput(NamedTuple):
    """What `forward` gives."""

    logits: Tensor
    """`[B, L, V]`, in the model's dtype, at temperature 1."""
    values: Tensor
    """`[B, L]` float32, in reward units."""


class Evaluation(NamedTuple):
    """What `evaluate` gives: recorded responses under the present weights. Slots past a response's end are 0."""

    logprobs: Tensor
    """`[B, T]` float32: log π(a_t | s_t) at the temperature asked for."""
    values: Tensor
    """`[B, T]` float32: V(s_t) in reward units; zeros if not asked for."""
    normalized_values: Tensor
    """`[B, T]` float32: the value head's own output u, with V = value_std · u + value_mean; zeros if not asked for."""
    entropy: Tensor
    """`[B, T]` float32: entropy of π(· | s_t); zeros if not asked for."""
    bootstrap_values: Tensor
    """`[B]` float32: value of the state after the last token; zeros if not asked for."""


class ValueHeadLM(nn.Module):
    """A causal language model, a value head, and how the two are read.

    Attributes:
        lm: The Hugging Face model (or the PEFT model around it), with its dropout off.
        value_head: Reads the hidden states of the policy's trunk, or of `critic_backbone`.
        critic_backbone: None if the trunk is shared.
        vocab_size: V, the logit width.
        config: The language model's configuration.
    """

    def __init__(self, lm: Any, critic: Critic | None = None) -> None:
        """Put a value head on a live model. Its dropout is switched off; its mode and weights are left alone.

        Args:
            lm: A Hugging Face causal LM or a PEFT model around one.
            critic: A value head and, if not shared, its trunk; by default a new head on the shared trunk.

        Raises:
            ValueError: If `lm` is no causal language model that this class can read.
        """
        super().__init__()
        disable_dropout(lm)  # before the check, which would see two draws differ
        check_head(lm, argument="lm")
        critic = critic if critic is not None else build_critic(lm, "shared")
        self.lm = lm
        self.value_head: ValueHead = critic.head
        self.critic_backbone: nn.Module | None = critic.backbone
        self.critic_kind = critic.kind
        self.vocab_size = logit_width(lm)
        if critic.backbone is not None:
            disable_dropout(critic.backbone)

    @classmethod
    def from_pretrained(
        cls,
        source: str | Path,
        *,
        critic: str | Path | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        lora: Any = None,
        gradient_checkpointing: bool = False,
        trust_remote_code: bool = False,
    ) -> ValueHeadLM:
        """Load a language model, or what `save_pretrained` wrote, ready to train.

        Args:
            source: A Hugging Face folder, a hub name, or a folder written by `save_pretrained`.
            critic: `"shared"` (a head on the policy's trunk), `"separate"` (a trunk of its own, starting as a copy of
                the policy's) or the folder of a reward model, whose trunk and score start the critic. None means what
                the folder says, or `"shared"`.
            dtype: Type of the weights; the value head is float32 whatever it is.
            device: Where everything goes.
            lora: A `peft.LoraConfig`: only adapters (and the critic) learn, and `reference()` is the base model.
            gradient_checkpointing: Trade time for memory in `evaluate`.
            trust_remote_code: Whether to run model code found in the folder.

        Returns:
            The policy, in train mode (there is no dropout, and checkpointing acts in train mode only).

        Raises:
            ValueError: If something cannot be loaded, or `critic` or `lora` contradicts the folder.
        """
        lm, parts = load_parts(source, critic, lora, dtype, device, trust_remote_code)
        policy = cls(lm, parts)
        if gradient_checkpointing:
            _enable_checkpointing(policy.lm, policy.critic_backbone)
        return policy.train()

    @property
    def config(self) -> PretrainedConfig:
        """The language model's configuration."""
        return self.lm.config

    @property
    def device(self) -> torch.device:
        """Where the policy is."""
        return self.value_head.linear.weight.device

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> PolicyOutput:
        """Logits and values at every position.

        Args:
            input_ids: `[B, L]`, padded on either side.
            attention_mask: `[B, L]`, nonzero at tokens; None if there is no padding.
        """
        hidden = masked_hidden(backbone(self.lm), input_ids, attention_mask)
        if self.critic_backbone is None:
            critic_hidden = hidden
        else:
            critic_hidden = masked_hidden(self.critic_backbone, input_ids, attention_mask)
        values = self.value_head.denormalize(self.value_head(critic_hidden))
        return PolicyOutput(output_head(self.lm)(hidden), values)

    def next_logits(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Logits `[B, V]` of the next token, after each row's last attended one: what an environment's `policy` gives.

        Args:
            input_ids: `[B, L]`, padded on either side.
            attention_mask: `[B, L]`, nonzero at tokens; None if there is no padding.
        """
        last = last_positions(input_ids, attention_mask)
        width = int(last.max()) + 1  # what every row has as padding on the right costs nothing
        mask = None if attention_mask is None else attention_mask[:, :width]
        hidden = masked_hidden(backbone(self.lm), input_ids[:, :width], mask)
        return output_head(self.lm)(hidden[torch.arange(len(last), device=last.device), last])

    def evaluate(
        self,
        input_ids: Tensor,
        prompt_lengths: Tensor,
        response_lengths: Tensor,
        *,
        temperature: float,
        with_logprobs: bool = True,
        with_entropy: bool = False,
        with_values: bool = True,
        with_bootstrap: bool = False,
        trunk_value_coef: float = 1.0,
    ) -> Evaluation:
        """Log-probs, values and entropies of recorded responses, differentiable, in one forward per trunk that is read.

        Slot t of a row is the action `y_t`, read with its value at the hidden state of the token before it, number
        `prompt_length + t - 1`. T is the longest response.

        Args:
            input_ids: `[B, L]`: prompt, then response, right-padded; what lies past the end has no influence.
            prompt_lengths: `[B]`, at least 1.
            response_lengths: `[B]`, at least 0.
            temperature: That of the softmax.
            with_logprobs: Whether to compute log-probs.
            with_entropy: Whether to compute entropies; with log-probs alone.
            with_values: Whether to compute values.
            with_bootstrap: Whether to compute the value of the state after the last token.
            trunk_value_coef: Scales the gradient that the values send into a shared trunk; 0 cuts it.

        Raises:
            ValueError: If the lengths do not fit `input_ids`, or entropies are asked for without log-probs.
        """
        if with_entropy and not with_logprobs:
            raise ValueError("with_entropy: expected False, because with_logprobs is False, got True")
        slots = Slots(prompt_lengths, response_lengths, input_ids, with_bootstrap)
        logprobs = entropy = values = normalized = torch.zeros(slots.shape, device=input_ids.device)
        bootstrap = logprobs.new_zeros(len(input_ids))
        with_critic, shared = with_values or with_bootstrap, self.critic_backbone is None
        at_actions = at_ends = torch.empty(0)
        if with_logprobs or (with_critic and shared):
            at_actions, at_ends = _read(backbone(self.lm), input_ids, slots, with_bootstrap)
        if with_logprobs:
            targets = input_ids.reshape(-1).index_select(0, slots.targets)
            head = output_head(self.lm)
            packed, entropies = packed_logprobs(at_actions, head, targets, temperature, with_entropy=with_entropy)
            logprobs = unpack(packed, slots.where, slots.shape)
            entropy = entropy if entropies is None else unpack(entropies, slots.where, slots.shape)
        if with_critic and self.critic_backbone is not None:
            at_actions, at_ends = _read(self.critic_backbone, input_ids, slots, with_bootstrap)
        elif with_critic and trunk_value_coef != 1.0:
            at_actions, at_ends = (scale_gradient(states, trunk_value_coef) for states in (at_actions, at_ends))
        if with_values:
            packed = self.value_head(at_actions)
            normalized = unpack(packed, slots.where, slots.shape)
            values = unpack(self.value_head.denormalize(packed), slots.where, slots.shape)
        if with_bootstrap:
            bootstrap = self.value_head.denormalize(self.value_head(at_ends))
        return Evaluation(logprobs, values, normalized, entropy, bootstrap)

    def final_values(self, input_ids: Tensor, lengths: Tensor) -> Tensor:
        """Value `[B]` of the state after each row's last token; `input_ids` `[B, L]` right-padded, `lengths` `[B]`."""
        trunk = self.critic_backbone if self.critic_backbone is not None else backbone(self.lm)
        slots = Slots(lengths, torch.zeros_like(lengths), input_ids, True)
        hidden = packed_hidden(trunk, input_ids, slots.packing, slots.last)
        return self.value_head.denormalize(self.value_head(hidden))

    def rescale_values(self, mean: float, std: float, *, preserve: bool = True) -> None:
        """Set the statistics by which values are normalised; see `ValueHead.rescale_values`."""
        self.value_head.rescale_values(mean, std, preserve=preserve)

    def policy_parameters(self) -> Iterator[nn.Parameter]:
        """The language model's parameters that learn (the shared trunk among them)."""
        return (p for p in self.lm.parameters() if p.requires_grad)

    def critic_parameters(self) -> Iterator[nn.Parameter]:
        """The parameters that learn and are the critic's alone: the value head and a separate trunk."""
        parts: Sequence[nn.Module] = [m for m in (self.critic_backbone, self.value_head) if m is not None]
        return (p for part in parts for p in part.parameters() if p.requires_grad)

    def reference(self) -> Shared:
        """The model that the policy started from, without a second copy of its weights: LoRA's base model.

        Raises:
            ValueError: If the policy has no adapter; its weights move, so it is not its own reference.
        """
        if type(self.lm).__module__.split(".")[0] != "peft":
            raise ValueError("reference() needs a policy with lora=...; load a second model as the reference instead")
        return Shared(self.lm, within=self.lm.disable_adapter)

    def save_pretrained(self, folder: str | Path, tokenizer: PreTrainedTokenizerBase | None = None) -> None:
        """Save everything `from_pretrained` needs, and the tokenizer if given, as `agents.policy_files` describes."""
        critic = Critic(self.critic_kind, self.value_head, self.critic_backbone)
        save_policy_files(self.lm, critic, Path(folder), tokenizer)


def _read(trunk: nn.Module, input_ids: Tensor, slots: Slots, with_ends: bool) -> tuple[Tensor, Tensor]:
    """Final hidden states of the tokens before each action, and of each row's last token, if they are asked for."""
    at = torch.cat([slots.sources, slots.last]) if with_ends else slots.sources
    actions, ends = packed_hidden(trunk, input_ids, slots.packing, at).tensor_split([len(slots.sources)])
    return actions, ends


def _enable_checkpointing(*models: Any) -> None:
    for model in models:
        if model is not None:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
