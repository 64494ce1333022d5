"""Batches of examples, padded or laid end to end, and the loss over held-out ones."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from scripts.finetuning.examples import IGNORED, Example
from textenv.logprobs import selected_logprobs
from textenv.models import backbone, output_head

Autocast = Callable[[], AbstractContextManager[Any]]
Collate = Callable[[Sequence[Mapping[str, Any]]], dict[str, Tensor]]


def padded(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Rows padded on the right, `[B, L]` each; masks come from lengths, so that padding may be EOS and EOS is learnt.

    No attention mask is passed and none is needed: in a causal model no token sees what is on its right.

    >>> batch = padded([{"input_ids": [5, 6], "labels": [-100, 6]}, {"input_ids": [7], "labels": [7]}])
    >>> batch["input_ids"].tolist(), batch["labels"].tolist()
    ([[5, 6], [7, 0]], [[-100, 6], [7, -100]])
    """

    def rows(name: str, filler: int) -> Tensor:
        tensors = [torch.tensor(row[name]) for row in features]
        return pad_sequence(tensors, batch_first=True, padding_value=filler)

    return {"input_ids": rows("input_ids", 0), "labels": rows("labels", IGNORED)}


def flattened(features: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """One row without padding, `[1, N]` each: positions begin anew with each example, whose first token is no target.

    Only for a model that `isolates`.
    """
    from transformers import DataCollatorWithFlattening

    batch: Any = DataCollatorWithFlattening()(list(features), return_tensors="pt")
    return batch


@torch.no_grad()
def isolates(model: Any) -> bool:
    """Whether examples in one row do not see each other, found by trying.

    transformers' attention is told by `position_ids` that begin anew, but not every family hands them to its mask, and
    a recurrent one has no mask at all.
    """
    device, vocabulary = next(model.parameters()).device, model.config.get_text_config().vocab_size
    ids = torch.tensor([[1, 2, 3, 4, 2, 1]], device=device).clamp(max=vocabulary - 1)
    positions = torch.tensor([[0, 1, 2, 0, 1, 2]], device=device)
    training = model.training
    model.eval()
    try:
        alone = torch.cat([model(input_ids=part, use_cache=False).logits for part in ids.split(3, dim=1)], dim=1)
        together, leaking = (
            model(input_ids=ids, position_ids=places, use_cache=False).logits
            for places in (positions, torch.arange(6, device=device)[None])
        )
    except TypeError:  # a model without positions
        return False
    finally:
        model.train(training)
    # Rounding, against what examples that see each other would do.
    return float((together - alone).norm()) < 1e-2 * float((leaking - alone).norm())


@torch.no_grad()
def heldout_loss(
    model: Any,
    examples: Sequence[Example],
    collate: Collate,
    *,
    batch_examples: int,
    autocast: Autocast,
) -> float:
    """Mean −log p of the learnt tokens, each token of all examples counting alike, so that batches do not matter.

    Logits are those of the learnt tokens alone, in chunks.
    """
    trunk, head = backbone(model), output_head(model)
    training = model.training
    model.eval()
    total, count = 0.0, 0
    for batch in _batches(examples, batch_examples):
        inputs = {name: value.to(model.device) for name, value in collate([e.features for e in batch]).items()}
        labels = inputs.pop("labels")[:, 1:]
        learnt = labels != IGNORED
        with autocast():
            hidden = trunk(**inputs, use_cache=False).last_hidden_state[:, :-1]
            total += float(selected_logprobs(hidden, head, labels, mask=learnt).double().sum())
        count += int(learnt.sum())
    model.train(training)
    return -total / count


def _batches(examples: Sequence[Example], size: int) -> Iterable[Sequence[Example]]:
    """By length, so that little of a batch is padding."""
    ordered = sorted(examples, key=lambda example: len(example.input_ids))
    return (ordered[start : start + size] for start in range(0, len(ordered), size))
