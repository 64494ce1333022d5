"""TRL's value-headed model, as a face on `ValueHeadLM`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from agents.adapters.trl_compat.config import tell_once
from agents.adapters.trl_compat.files import forget_adapter, save_adapter
from agents.adapters.trl_compat.head import CachedOutputWithValue, CausalLMOutputWithValue, VHead
from agents.adapters.trl_compat.loading import (
    is_peft,
    live_model,
    load_policy,
    one_device,
    refuse,
    weights_dtype,
    with_adapter,
)
from agents.policy import ValueHeadLM


class AutoModelForCausalLMWithValueHead(nn.Module):
    """A causal language model and a value head on its last hidden states, under TRL's names.

    Values are in reward units: the statistics by which `ValueHeadLM` normalises stay at mean 0 and deviation 1. All
    dropout is off, the model's, LoRA's and the head's.

    Attributes:
        pretrained_model: The Hugging Face model, or the PEFT model around it.
        v_head: The value head; starts at 0 unless asked otherwise.
        policy: The `ValueHeadLM` of the same weights.
        is_peft_model: Whether there is an adapter.
    """

    def __init__(self, policy: ValueHeadLM) -> None:
        """Put TRL's names on a policy; `from_pretrained` is the usual way here."""
        super().__init__()
        policy.rescale_values(0.0, 1.0, preserve=True)
        self.pretrained_model: Any = policy.lm  # registered first: parameters bear TRL's names
        self.v_head = VHead(policy.value_head)
        self.policy = policy
        self.is_peft_model = is_peft(policy.lm)

    @classmethod
    def from_pretrained(
        cls,
        pretrained_model_name_or_path: Any,
        *,
        peft_config: Any = None,
        is_trainable: bool = False,
        torch_dtype: torch.dtype | str | None = None,
        dtype: torch.dtype | str | None = None,
        device_map: Any = None,
        trust_remote_code: bool = False,
        v_head_init_strategy: Literal["normal"] | None = None,
        v_head_initializer_range: float = 0.2,
        summary_dropout_prob: float | None = None,
        low_cpu_mem_usage: bool | None = None,
        load_in_8bit: bool = False,
        load_in_4bit: bool = False,
        quantization_config: Any = None,
        reward_adapter: str | None = None,
        attn_implementation: str | None = None,
        revision: str | None = None,
        token: Any = None,
    ) -> AutoModelForCausalLMWithValueHead:
        """Load a model with a value head, from wherever TRL could.

        Args:
            pretrained_model_name_or_path: A folder or hub name (of a plain model, of what TRL up to 0.11 or
                LLaMA-Factory saved, of an adapter, or of what `save_pretrained` here wrote), or a live model.
            peft_config: A `peft.LoraConfig` for a new adapter; the base model is then the reference.
            is_trainable: Whether a saved adapter goes on learning.
            torch_dtype: Type of the weights: a `torch.dtype`, its name, or `"auto"`; None: float32.
            dtype: The new name of `torch_dtype`.
            device_map: One device, `"auto"` or `{"": device}`; None: the CPU, until a trainer moves it.
            trust_remote_code: Whether to run model code found in the folder.
            v_head_init_strategy: `"normal"` draws the head's weights; None starts a new head at 0.
            v_head_initializer_range: Standard deviation of `"normal"`.
            summary_dropout_prob: No effect: all dropout is off.
            low_cpu_mem_usage: No effect: loading is so anyway.
            load_in_8bit: Must be False; pass a live model that is.
            load_in_4bit: Likewise.
            quantization_config: Must be None; pass a live model that has it.
            reward_adapter: Must be None; score with a model of its own.
            attn_implementation: Must be None; pass a live model.
            revision: Likewise.
            token: Likewise.

        Raises:
            ValueError: If something cannot be loaded, or an argument asks for what is not here.
        """
        refuse(load_in_8bit=load_in_8bit, load_in_4bit=load_in_4bit, quantization_config=quantization_config)
        refuse(attn_implementation=attn_implementation, revision=revision, token=token)
        if reward_adapter is not None:
            raise ValueError(f"reward_adapter: expected None, got {reward_adapter!r}; score with a model of its own")
        if summary_dropout_prob:
            tell_once("summary_dropout_prob", "has no effect: all dropout is off, or the ratio would not start at 1")
        source, where = pretrained_model_name_or_path, one_device(device_map)
        if isinstance(source, str | Path):
            resolved = weights_dtype(source, torch_dtype, dtype, trust_remote_code)
            policy, saved = load_policy(source, peft_config, resolved, where, trust_remote_code, is_trainable)
        else:
            lm = live_model(source, torch_dtype or dtype, device_map)
            policy, saved = ValueHeadLM(with_adapter(lm, peft_config)), {}
        model = cls(policy)
        if saved:
            model.v_head.take(saved, source)
        elif v_head_init_strategy == "normal":
            nn.init.normal_(model.v_head.summary.weight, std=v_head_initializer_range)
        elif v_head_init_strategy is not None:
            raise ValueError(f"v_head_init_strategy: expected None or 'normal', got {v_head_init_strategy!r}")
        return model.train()

    @property
    def config(self) -> Any:
        """The language model's configuration."""
        return self.pretrained_model.config

    @property
    def device(self) -> torch.device:
        """Where the model is."""
        return self.policy.device

    def forward(
        self,
        input_ids: Tensor,
        past_key_values: Any = None,
        attention_mask: Tensor | None = None,
        return_past_key_values: bool = False,
        *,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        token_type_ids: Tensor | None = None,
    ) -> CausalLMOutputWithValue | CachedOutputWithValue:
        """Logits, loss and values, as a tuple and by name.

        Args:
            input_ids: `[B, L]`, padded on either side.
            past_key_values: A cache to go on from.
            attention_mask: `[B, L]` (with a cache, over the cached tokens too), nonzero at tokens; None: no padding.
            return_past_key_values: Whether the cache is a fourth part of the result.
            labels: `[B, L]`, shifted inside; -100 counts for nothing.
            position_ids: `[B, L]`; None: counted from the mask.
            token_type_ids: Ignored: a causal language model has one segment. Some tokenizers give it.
        """
        past = None
        if past_key_values is None and position_ids is None and not return_past_key_values:
            logits, values = self.policy(input_ids, attention_mask)
        elif self.policy.critic_backbone is not None:
            raise ValueError("past_key_values, position_ids: expected None, this model's critic has a trunk of its own")
        else:
            if position_ids is None and attention_mask is not None:
                counted = (attention_mask.long().cumsum(1) - 1).clamp(min=0)
                position_ids = counted[:, -input_ids.shape[1] :]
            output = self.pretrained_model(
                input_ids=input_ids,
                attention_mask=attention_mask,
                position_ids=position_ids,
                past_key_values=past_key_values,
                use_cache=return_past_key_values or past_key_values is not None,
                output_hidden_states=True,
            )
            logits, past = output.logits, output.past_key_values
            values = self.v_head(output.hidden_states[-1]).squeeze(-1)
        logits, loss = logits.float(), None
        if labels is not None:
            loss = nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        if return_past_key_values:
            return CachedOutputWithValue(logits, loss, values, past)
        return CausalLMOutputWithValue(logits, loss, values)

    def generate(self, *inputs: Tensor, **generation_kwargs: Any) -> Any:
        """The Hugging Face model's own `generate`, with its own arguments, which it checks.

        Args:
            *inputs: Prompts `[B, L]`, padded on the left.
            **generation_kwargs: As of `transformers.GenerationMixin.generate`.
        """
        with evaluating(self.pretrained_model):
            return self.pretrained_model.generate(*inputs, **generation_kwargs)

    def state_dict(self, *, destination: Any = None, prefix: str = "", keep_vars: bool = False) -> Any:  # type: ignore[override]
        """The language model's weights and `v_head.summary.*`; of a PEFT model the latter alone, as in TRL."""
        state = {} if destination is None else destination
        if not self.is_peft_model:
            self.pretrained_model.state_dict(destination=state, prefix=prefix, keep_vars=keep_vars)
        self.v_head.state_dict(destination=state, prefix=prefix + "v_head.", keep_vars=keep_vars)
        return state

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """Take what `state_dict` gave."""
        head = {name.removeprefix("v_head."): value for name, value in state_dict.items() if name.startswith("v_head.")}
        rest = {name: value for name, value in state_dict.items() if not name.startswith("v_head.")}
        keys = self.v_head.load_state_dict(head, strict=strict, assign=assign)
        if self.is_peft_model and not rest:
            return keys
        return self.pretrained_model.load_state_dict(rest, strict=strict, assign=assign)

    def save_pretrained(self, save_directory: str | Path) -> None:
        """Save what `from_pretrained` loads.

        A whole model becomes a folder of `ValueHeadLM` (transformers alone loads its language model); of a PEFT model
        only the adapter and the value head are written, as in TRL.
        """
        folder = Path(save_directory)
        if self.is_peft_model:
            save_adapter(self.pretrained_model, self.v_head.state_dict(), folder)
        else:
            forget_adapter(folder)
            self.policy.save_pretrained(folder)

    def gradient_checkpointing_enable(self, gradient_checkpointing_kwargs: dict[str, Any] | None = None) -> None:
        """Less memory, more time, in train mode."""
        kwargs = {"use_reentrant": False} if gradient_checkpointing_kwargs is None else gradient_checkpointing_kwargs
        self.pretrained_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs=kwargs)

    def gradient_checkpointing_disable(self) -> None:
        """The opposite."""
        self.pretrained_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        """Let gradients through the embeddings, for reentrant checkpointing of a PEFT model."""
        self.pretrained_model.enable_input_require_grads()


@contextmanager
def evaluating(module: nn.Module) -> Iterator[None]:
    """In eval mode for a while: in train mode gradient checkpointing would forbid the key-value cache."""
    training = module.training
    module.eval()
    try:
        yield
    finally:
        module.train(training)
