"""The model card, rendered from the figures that the stages left."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

TEMPLATE = """# The embedded models

What `gym.make("RLHF-Text-v0")` uses when it is given no models: made from scratch by `scripts/make_embedded.py`.
The figures on this page were written by that script.

## Storyteller (`storyteller/`)

A Llama of {parameters:,} parameters ({layers} layers, width {hidden}, {heads} heads of {head_dim} over {kv_heads} key-value
heads, context {context}, byte-level BPE of {vocabulary} pieces), stored as float16. BOS `<s>`, EOS `</s>` and PAD `<pad>` differ.

- **Data.** {training_stories_real:,} stories of TinyStories (Eldan & Li 2023; CDLA-Sharing-1.0) and
  {training_stories_sampled:,} stories sampled from `stories260K`, a public model trained on the same data (MIT). The text itself is
  not part of this project.
- **Recipe.** {steps:,} AdamW steps of {batch_rows} stories, {share:.0%} of them real, peak learning rate {learning_rate}; the weights with
  the least held-out loss are kept.
- **Held-out loss** ({heldout_stories} real stories): {heldout_nats_per_token:.3f} nats per token, {heldout_bits_per_byte:.3f} bits per byte.

Samples at temperature 1:

{samples}

## Reward model (`reward/`)

The storyteller's trunk with one score: how *happy* a continuation is. Stored as float16; `reward_bias` in its config is
added to the score.

- **Preferences.** Pairs of continuations of one opening: plain, hotter and steered samples of the storyteller, and degenerate
  ones (word salads, stutters, echoes, shuffled and stuffed sentences). A simulated judge prefers the happier by human word
  ratings (VADER lexicon, Hutto & Gilbert 2014, MIT; not shipped): distinct words only, saturating, less for repetition and for text that
  the storyteller would hardly tell, P = σ({sharpness}·Δu).
- **Recipe.** Bradley-Terry loss on {pairs:,} pairs, trunk started from the storyteller.
- **Held-out accuracy** (openings not trained on): {accuracy_noiseless:.1%} against the judge's own order, {accuracy_noisy:.1%} against its
  noisy labels ({label_noise:.1%} of which are wrong). Correlation with the utility {correlation_with_utility:.2f}; with the
  valence of plain samples {correlation_with_valence:.2f}.
- **Scale.** The storyteller's responses of 48 tokens have mean 0 and standard deviation 1.

## Prompts

`prompts.txt` ({prompts}) and `heldout.txt` ({heldout}) are disjoint openings that the storyteller told itself.

## Licence and limits

The models and prompts are MIT, as the project. They are for tests, demos and teaching: the storyteller writes simple English
that loses its thread, and the reward model knows happy words, not happiness.
"""


def write_card(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write card.json and MODEL_CARD.md."""
    (folder / "card.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf8")
    told = "\n\n".join("> " + text.replace("\n", "\n> ") for text in figures["samples"][:3])
    (folder / "MODEL_CARD.md").write_text(TEMPLATE.format(**dict(figures, samples=told)), encoding="utf8")
