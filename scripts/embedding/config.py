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
    """Folder with data/tinystories_sample.txt, data/vader_lexicon.txt, data/movie_snippets_mean_rating.tsv and models/stories260K."""
    output: Path
    """Folder that receives storyteller/, reward/, prompts.txt, heldout.txt, MODEL_CARD.md and card.json."""
    work: Path = Path("runs/embedded")
    """Folder of the stages' results; a stage whose result is there is skipped."""
    device: str = "cpu"
    """Where to sample and train: "cpu" or "cuda"."""
    quick: bool = False
    """Run every stage at toy size, to test the program; the models are then worthless."""
    seed: int = 20
    """Seed of every stage."""
    compile: bool = True
    """On CUDA, try torch.compile on the training losses; if that fails, go on without."""

    teacher_stories: int = 120_000
    """How many stories to sample from stories260K."""
    teacher_tokens: int = 400
    """Longest sampled story in the teacher's tokens; about one context of the storyteller."""
    teacher_temperature: float = 0.8
    """Sampling temperature of the teacher; below 1 its text is more coherent."""
    sample_rows: int = 4096
    """Rows sampled at a time."""
    score_rows: int = 1024
    """Rows per forward pass when texts are only scored."""

    vocabulary: int = 2048
    """Pieces of the byte-level BPE tokenizer, special tokens included."""
    context: int = 256
    """Longest text in tokens."""
    hidden: int = 128
    """Width of both models."""
    heads: int = 4
    """Attention heads; their width is hidden / heads."""
    key_value_heads: int = 2
    """Key-value heads."""
    intermediate: int = 384
    """Width of the gated feed-forward layer."""
    layers: int = 4
    """Blocks of the storyteller."""
    reward_layers: int = 4
    """Blocks of the reward model: the storyteller's first ones."""

    real_fractions: tuple[float, ...] = (0.06, 0.16)
    """Share of real stories in a batch; one storyteller is trained per share and the best on held-out text is kept."""
    steps: int = 8000
    """Optimizer steps per storyteller."""
    minutes: float = 2.2
    """Time limit per storyteller: the learning rate's schedule ends there if the steps have not."""
    batch_rows: int = 512
    """Stories per optimizer step."""
    learning_rate: float = 3e-3
    """Peak learning rate of the storyteller."""

    prompts: int = 1536
    """Openings in prompts.txt."""
    heldout: int = 256
    """Openings in heldout.txt."""
    extra_openings: int = 4096
    """Further openings, cut from training stories, on which preferences are collected."""
    sampled_per_opening: int = 24
    """Continuations sampled per opening: a third each plain, hotter, steered."""
    adversarial_per_opening: int = 6
    """Degenerate continuations made per opening."""
    reward_steps: int = 4000
    """Optimizer steps of the reward model."""
    reward_minutes: float = 1.5
    """Time limit of the reward model's training."""
    reward_pairs: int = 512
    """Preference pairs per optimizer step; every pair is new."""
    reward_learning_rate: float = 6e-4
    """Peak learning rate of the reward model."""
    preference_sharpness: float = 0.75
    """k of the simulated judge P(a preferred to b) = sigmoid(k (utility a - utility b))."""
    human_share: float = 0.05
    """Share of the pairs that are human-rated film sentences."""

    def __post_init__(self) -> None:
        """Check what would otherwise fail late."""
        if not (self.material / "data" / "tinystories_sample.txt").is_file():
            raise ValueError(f"material must hold data/tinystories_sample.txt, got the folder {self.material}")
        if self.device.split(":")[0] not in ("cpu", "cuda"):
            raise ValueError(f"device must be 'cpu' or 'cuda', got {self.device!r}")
        if not self.real_fractions or not all(0.0 < share <= 1.0 for share in self.real_fractions):
            raise ValueError(f"real_fractions must be shares in (0, 1], got {self.real_fractions}")


def shrink(config: Config) -> Config:
    """The toy sizes of ``quick``."""
    return replace(
        config, teacher_stories=96, teacher_tokens=160, sample_rows=96, score_rows=64, vocabulary=512, hidden=64, heads=2,
        key_value_heads=1, intermediate=128, layers=2, reward_layers=2, real_fractions=(0.3,), steps=60, batch_rows=16,
        prompts=48, heldout=16, extra_openings=16, sampled_per_opening=6, adversarial_per_opening=6, reward_steps=60,
        reward_pairs=16,
    )  # fmt: skip
