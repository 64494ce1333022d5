"""A reward model of tokens: a causal model with a token-classification head."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textenv.models import load_classifier
from textenv.rewards.base import RewardContext
from textenv.rewards.batching import by_length, check_lengths, padded
from textenv.rewards.reward import Ids


class TokenClassifierReward:
    """Value t = the head's answer at response token t, of a causal model with a token-classification head.

    The ids are the policy's, so the model must have the policy's vocabulary. With one label the value is the logit,
    with more the probability of `label`. A model that looks ahead (BERT) is refused: what it says of token t would not
    be known at step t.
    """

    wants_ids = True
    per_token = True

    def __init__(
        self,
        source: str | Path,
        *,
        argument: str = "reward",
        label: int | str | None = None,
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = 16_384,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a token classifier.

        Args:
            source: Folder or hub name; safetensors only.
            argument: For error messages.
            label: Whose probability is the value, by number or name; None: the only one's logit.
            device: Where it runs.
            dtype: Its floating-point type.
            batch_tokens: How many padded tokens one forward may hold.
            trust_remote_code: Whether the folder may bring Python code.

        Raises:
            ValueError: If the folder is unknown or holds something else, if the label is unknown, or if the model looks
                ahead.
        """
        model, self.tokenizer = load_classifier(
            source, argument=argument, device=device, dtype=dtype, trust_remote_code=trust_remote_code, of_tokens=True
        )
        self.model: Any = model
        self.model.config.use_cache = False
        self.label, self.batch_tokens = _label(self.model.config, label), batch_tokens
        self.context = getattr(self.model.config, "max_position_embeddings", None)
        if not _is_causal(self.values_of):
            raise ValueError(f"{argument}: expected a causal model, got {type(model).__name__}, which looks ahead")

    def bind(self, context: RewardContext) -> TokenClassifierReward:
        """Itself, if the vocabulary is the policy's.

        Raises:
            ValueError: If it is another.
        """
        given = context.tokenizer
        if given is not None and given.get_vocab() != self.tokenizer.get_vocab():
            raise ValueError(f"{context.place}: expected a token classifier with the policy's vocabulary, got another")
        return self

    def __call__(self, prompts: Ids, responses: Ids) -> list[Tensor]:
        """One value per token of each response."""
        rows = [[*p, *r] for p, r in zip(prompts, responses, strict=True)]
        check_lengths([len(row) for row in rows], self.context)
        return [values[len(p) :] for p, values in zip(prompts, self.values_of(rows), strict=True)]

    @torch.no_grad()
    def values_of(self, rows: Ids) -> list[Tensor]:
        """One value per token of each row."""
        found: dict[int, Tensor] = {}
        for batch in by_length([len(row) for row in rows], self.batch_tokens):
            ids, _ = padded([rows[row] for row in batch], self.model.device)
            logits = self.model(input_ids=ids).logits.float()
            values = logits[..., 0] if self.label is None else logits.softmax(-1)[..., self.label]
            found |= {row: values[place, : len(rows[row])].cpu() for place, row in enumerate(batch)}
        return [found[row] for row in range(len(rows))]


def _label(config: Any, label: int | str | None) -> int | None:
    names = dict(config.id2label)
    if label is None and len(names) == 1:
        return None
    for number, name in names.items():
        if label is not None and label in (number, name):
            return int(number)
    raise ValueError(f"label: expected one of {names}, got {label!r}")


def _is_causal(values_of: Callable[[Ids], list[Tensor]]) -> bool:
    """Whether the first value stays when the second token changes."""
    one, two = values_of([[1, 1], [1, 0]])
    return bool(torch.allclose(one[0], two[0], rtol=1e-3, atol=1e-5))
