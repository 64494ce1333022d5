"""A reward model: a sequence classifier with one label."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from textenv.models import load_classifier
from textenv.rewards.batching import by_length, check_lengths, padded


class ClassifierReward:
    """score(x, y) = w·h_last + b of a sequence classifier that reads prompt and response as one text.

    The text is encoded with the classifier's own tokenizer, which need not be the policy's. The backbone and the head
    are run here and the hidden state is taken at length − 1: transformers takes the last id that is not PAD, which is
    another one when EOS = PAD. `reward_bias` in the model's config (0 where absent) is added; it centres the scores.
    σ(`scale`·(score_a − score_b)) is the probability that a is preferred to b; `scale` is the config's `reward_scale`,
    which undoes the normalisation of scores (1 where absent).
    """

    def __init__(
        self,
        source: str | Path,
        *,
        argument: str = "reward",
        device: str | torch.device = "cpu",
        dtype: torch.dtype = torch.float32,
        batch_tokens: int = 16_384,
        trust_remote_code: bool = False,
    ) -> None:
        """Load a reward model.

        Args:
            source: Folder or hub name of a sequence classifier with one label; safetensors only.
            argument: For error messages.
            device: Where it runs.
            dtype: Its floating-point type; the head is float32.
            batch_tokens: How many padded tokens one forward may hold.
            trust_remote_code: Whether the folder may bring Python code.

        Raises:
            ValueError: If the folder is unknown or holds something else.
        """
        self.source = source
        self.batch_tokens = batch_tokens
        model, self.tokenizer = load_classifier(
            source, argument=argument, device=device, dtype=dtype, trust_remote_code=trust_remote_code
        )
        self.model: Any = model
        if not isinstance(getattr(model, "score", None), torch.nn.Linear):
            raise ValueError(
                f"{argument}: expected a classifier with a linear head named score, got {type(model).__name__}"
            )
        self.bias = float(getattr(self.model.config, "reward_bias", 0.0))
        self.scale = float(getattr(self.model.config, "reward_scale", 1.0))
        self.context = getattr(self.model.config, "max_position_embeddings", None)

    def __call__(self, prompts: Sequence[str], responses: Sequence[str]) -> Tensor:
        """Scores `[n]` of prompt + response."""
        rows = self.tokenizer([p + r for p, r in zip(prompts, responses, strict=True)])["input_ids"]
        check_lengths([len(ids) for ids in rows], self.context)
        return self.score_ids(rows)

    @torch.no_grad()
    def score_ids(self, rows: Sequence[Sequence[int]]) -> Tensor:
        """Scores `[n]` of token-id rows, in batches of similar lengths."""
        scores = torch.empty(len(rows))
        for batch in by_length([len(ids) for ids in rows], self.batch_tokens):
            scores[batch] = self._forward([rows[row] for row in batch]).cpu()
        return scores

    def _forward(self, rows: Sequence[Sequence[int]]) -> Tensor:
        device = self.model.device
        ids, lengths = padded(rows, device)
        mask = torch.arange(ids.shape[1], device=device) < lengths[:, None]
        backbone = getattr(self.model, self.model.base_model_prefix)
        hidden = backbone(input_ids=ids, attention_mask=mask.long(), use_cache=False).last_hidden_state
        last = hidden[torch.arange(len(rows), device=device), lengths - 1]
        head = self.model.score
        bias = None if head.bias is None else head.bias.float()
        return torch.nn.functional.linear(last.float(), head.weight.float(), bias).squeeze(-1) + self.bias
