"""Sizes, schedules and paths of the embedded models' making."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from pathlib import Path

_START = time.perf_counter()


def log(message: str) -> None:
    """Print ``message`` after the seconds since the program started."""
    print(f"[{time.perf_counter() - _START:7.1f} s] {message}", flush=True)


@dataclass(frozen=True)
class Config:
    """Everything that decides what the embedded models become."""

    material: Path
    """Folder with data/tinystories_sample.txt, data/vader_lexicon.txt and models/stories260K."""
    output: Path
    """Folder that receives storyteller/, reward/, corpus/, prompts.txt, heldout.txt, MODEL_CARD.md and card.json."""
    work: Path = Path("runs/embedded")
    """Folder of the stages' results; a stage whose result is there is skipped."""
    device: str = "cpu"
    """Where to sample and train: "cpu" or "cuda"."""
    quick: bool = False
    """Run every stage at toy size, to test the program; the models are then worthless."""
    seed: int = 20
    """Seed of every stage."""
    corpus_only: bool = False
    """Make the corpus alone, of the storyteller and the openings that are in `output`."""
    compile: bool = True
    """On CUDA, try torch.compile on the training losses; if that fails, go on without."""

    teacher_stories: int = 16_000
    """How many stories to sample from stories260K."""
    teacher_tokens: int = 256
    """Longest sampled story in the teacher's tokens; what is cut there has no end token."""
    teacher_temperature: float = 0.8
    """Sampling temperature of the teacher; below 1 its text is more coherent."""
    teacher_minutes: float = 20.0
    """Time limit of the teacher's sampling: fewer stories are made if it passes."""
    sample_rows: int = 512
    """Rows sampled at a time."""
    score_rows: int = 256
    """Rows per forward pass when texts are only scored."""

    vocabulary: int = 1024
    """Pieces of the byte-level BPE tokenizer, special tokens included."""
    context: int = 256
    """Longest text in tokens."""
    hidden: int = 128
    """Width of both models."""
    heads: int = 4
    """Attention heads; their width is hidden / heads."""
    key_value_heads: int = 2
    """Key-value heads."""
    intermediate: int = 320
    """Width of the gated feed-forward layer."""
    layers: int = 3
    """Blocks of the storyteller."""
    reward_layers: int = 2
    """Blocks of the reward model: the storyteller's first ones."""

    real_fractions: tuple[float, ...] = (0.2,)
    """Share of real stories in a batch; one storyteller is trained per share and the best on held-out text is kept."""
    steps: int = 4000
    """Optimizer steps per storyteller."""
    minutes: float = 20.0
    """Time limit per storyteller: the learning rate's schedule ends there if the steps have not."""
    batch_rows: int = 64
    """Stories per optimizer step; a fourth of the steps take fewer, but up to the whole context of each."""
    short_rows: int = 96
    """Tokens of a story that the other steps read: openings and what follows them matter most."""
    learning_rate: float = 4e-3
    """Peak learning rate of the storyteller."""

    prompts: int = 1536
    """Openings in prompts.txt."""
    heldout: int = 256
    """Openings in heldout.txt."""
    extra_openings: int = 64
    """Further openings, cut from training stories, on which preferences are collected."""
    sampled_per_opening: int = 9
    """Continuations sampled per opening: a third each plain, hotter, steered."""
    adversarial_per_opening: int = 3
    """Degenerate continuations made per opening, at most one of each of the five kinds."""
    reward_steps: int = 1500
    """Optimizer steps of the reward model."""
    reward_minutes: float = 6.0
    """Time limit of the reward model's training."""
    reward_pairs: int = 64
    """Preference pairs per optimizer step; every pair is new."""
    reward_learning_rate: float = 1e-3
    """Peak learning rate of the reward model."""
    preference_sharpness: float = 0.75
    """k of the simulated judge P(a preferred to b) = sigmoid(k (utility a - utility b))."""

    def __post_init__(self) -> None:
        """Check what would otherwise fail late."""
        if not (self.material / "data" / "tinystories_sample.txt").is_file():
            raise ValueError(f"material: expected data/tinystories_sample.txt in it, got {self.material}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if not self.real_fractions or not all(0.0 < share <= 1.0 for share in self.real_fractions):
            raise ValueError(f"real_fractions must be shares in (0, 1], got {self.real_fractions}")


def shrink(config: Config) -> Config:
    """The toy sizes of ``quick``."""
    return replace(
        config, teacher_stories=96, teacher_tokens=160, sample_rows=96, score_rows=64, vocabulary=512, hidden=64,
        heads=2, key_value_heads=1, intermediate=128, layers=2, reward_layers=2, real_fractions=(0.3,), steps=60,
        batch_rows=16, prompts=48, heldout=16, extra_openings=16, sampled_per_opening=6, adversarial_per_opening=5,
        reward_steps=60, reward_pairs=16,
    )  # fmt: skip
