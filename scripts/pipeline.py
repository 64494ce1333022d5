"""From text and preferences to an aligned model and the evidence: fine-tuning, reward model, PPO, evaluation.

Without flags it goes through on the embedded corpus in some minutes. Each stage is one of the other scripts, whose
command line is shown; one whose result is there is skipped, one that was interrupted goes on where it can, one whose
data have changed is run anew with all that comes after it.

    python scripts/pipeline.py
    python scripts/pipeline.py --model my-model --tales my-tales.jsonl --preferences my-pairs.jsonl --out runs/mine
"""

from __future__ import annotations

import hashlib
import json
import shlex
import shutil
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import tyro
from rich.console import Console
from rich.markup import escape

import textenv
from scripts.evaluate import named
from scripts.options import run

_COMMAND, _INPUTS, _DONE = "command.json", "inputs.json", "done"
"""In each stage's folder: script and flags that made it, checksums of what they read, and the mark that it has come to
its end."""


@dataclass(frozen=True)
class Flags:
    """The whole way from a language model to an aligned one."""

    model: Path = textenv.embedded.STORYTELLER
    """The language model to begin with."""
    tales: Path = textenv.embedded.TALES
    """What to imitate: rows of `prompt` and `response`."""
    preferences: Path = textenv.embedded.PREFERENCES
    """What people like: rows of `prompt`, `chosen` and `rejected`."""
    prompts: Path = textenv.embedded.PROMPTS
    """Prompts to learn on."""
    heldout: Path = textenv.embedded.HELDOUT
    """Prompts to evaluate on."""
    second_reward: str = f"embedded reward={textenv.embedded.REWARD}"
    """A reward that nothing learns from, to see whether the first one is fooled."""
    sft_epochs: float = 2.0
    """Passes over what is imitated."""
    sft_learning_rate: float = 3e-4
    """Its peak rate; it suits models of under a million parameters, 1e-5 one of billions."""
    iterations: int = 80
    """Updates of PPO."""
    kl_coef: float = 0.15
    """β, the price of a nat of KL."""
    seed: int = 0
    """Of every stage."""
    threads: int = 1
    """CPU threads."""
    out: Path = Path("runs/pipeline")
    """Folder of everything that is written."""


@dataclass(frozen=True)
class Stage:
    """One script and what it leaves behind."""

    name: str
    """Its folder in `out`."""
    gives: str
    """What comes of it, in words."""
    command: tuple[str, ...]
    """Script and flags."""
    inputs: tuple[Path, ...]
    """Files and folders that it reads, but for what earlier stages made; a name of something else is passed over."""
    checkpoint: Path | None = None
    """Where this is, `--resume` goes on."""

    @property
    def checkpoints(self) -> tuple[Path, ...]:
        """The checkpoint, and the one that `agents.checkpoint` was replacing if it was killed then."""
        path = self.checkpoint
        return () if path is None else (path, path.with_name(f".{path.name}.previous"))


def stages(flags: Flags) -> list[Stage]:
    """What is done, in order."""
    out = flags.out
    sft, reward, ppo, evaluation = (out / name for name in ("sft", "reward", "ppo", "evaluation"))
    task = ("--env.reward", f"{reward}/model", "--env.heldout", str(flags.heldout))
    return [
        Stage(
            "sft",
            "the model that tells short tales: actor and reference of what follows",
            (
                *("train_sft.py", "--model", str(flags.model), "--data.train", str(flags.tales)),
                *("--sft.epochs", str(flags.sft_epochs), "--sft.learning-rate", str(flags.sft_learning_rate)),
                *("--sft.seed", str(flags.seed), "--out", str(sft)),
            ),
            (flags.model, flags.tales),
            sft / "checkpoints",
        ),
        Stage(
            "reward",
            "the reward model",
            (
                *("train_reward.py", "--data", str(flags.preferences), "--recipe.model", f"{sft}/model"),
                *("--reference", str(flags.tales), "--recipe.seed", str(flags.seed), "--out", str(reward)),
            ),
            (flags.preferences, flags.tales),
            reward / "checkpoints",
        ),
        Stage(
            "ppo",
            "the actor after learning, with its critic",
            (
                *("train_ppo.py", "--policy.model", f"{sft}/model", *task, "--env.prompts", str(flags.prompts)),
                *("--env.kl-coef", str(flags.kl_coef), "--iterations", str(flags.iterations)),
                *("--ppo.seed", str(flags.seed), "--out", str(ppo)),
            ),
            (flags.prompts, flags.heldout),
            ppo / "checkpoint",
        ),
        Stage(
            "evaluation",
            "the evidence",
            (
                *("evaluate.py", "--model", f"{ppo}/policy", "--env.reference", f"{sft}/model", *task),
                *("--second-reward", flags.second_reward, "--out", str(evaluation)),
            ),
            (flags.heldout, Path(named("", flags.second_reward)[1])),
        ),
    ]


def main(flags: Flags) -> None:
    """Run the stages that are not done."""
    console, todo = Console(), stages(flags)
    for number, stage in enumerate(todo, start=1):
        console.rule(f"[bold]{number}  {stage.name}[/] → {stage.gives}", align="left")
        if is_done(stage, flags.out):
            console.print(f"[dim]{_folder(stage, flags.out)} is there[/]")
            continue
        start = time.perf_counter()
        perform(stage, todo[number:], flags, console)
        console.print(f"[dim]{time.perf_counter() - start:.0f} s[/]")
    console.rule(align="left")
    console.print(f"[bold]report[/] {flags.out}/evaluation/report.html   [bold]policy[/] {flags.out}/ppo/policy")


def is_done(stage: Stage, out: Path) -> bool:
    """Whether this very command has come to its end there, on these inputs.

    Raises:
        ValueError: If something else is there.
    """
    folder = _folder(stage, out)
    # A command that was refused, for a flag that was mistyped for instance, has left nothing but itself.
    made = folder.is_dir() and {path.name for path in folder.iterdir()} - {_COMMAND, _INPUTS}
    if made and _told(folder / _COMMAND) != list(stage.command):
        raise ValueError(
            f"out: expected a folder of the same settings, got {out}, where {stage.name} was made with others; remove "
            f"{folder} to make it anew, or choose another folder"
        )
    return (folder / _DONE).is_file() and _is_begun(stage, out)


def perform(stage: Stage, later: Sequence[Stage], flags: Flags, console: Console) -> None:
    """Run a stage's script, from its checkpoint if there is one; what was made of its earlier result is forgotten.

    The command line and the checksums stay beside what it makes, and a mark when it has come to its end.

    Raises:
        ValueError: If it fails.
    """
    folder = _folder(stage, flags.out)
    resume = _is_begun(stage, flags.out) and any(checkpoint.exists() for checkpoint in stage.checkpoints)
    for old in later if resume else (stage, *later):
        (_folder(old, flags.out) / _DONE).unlink(missing_ok=True)
        for checkpoint in filter(Path.exists, old.checkpoints):
            shutil.rmtree(checkpoint)
    script, *arguments = (*stage.command, "--threads", str(flags.threads), *(["--resume"] if resume else []))
    console.print(f"[dim]$ python scripts/{escape(shlex.join([script, *arguments]))}[/]", soft_wrap=True)
    folder.mkdir(parents=True, exist_ok=True)
    for name, told in ((_COMMAND, stage.command), (_INPUTS, checksums(stage.inputs))):
        (folder / name).write_text(json.dumps(told) + "\n", encoding="utf8")
    code = subprocess.run([sys.executable, str(Path(__file__).with_name(script)), *arguments]).returncode
    if code != 0:
        raise ValueError(f"{stage.name}: expected exit status 0, got {code}; the same command goes on from here")
    (folder / _DONE).touch()


def _folder(stage: Stage, out: Path) -> Path:
    return out / stage.name


def _is_begun(stage: Stage, out: Path) -> bool:
    """Whether what is there was begun by this command, on inputs that are what they were."""
    folder = _folder(stage, out)
    same = _told(folder / _COMMAND) == list(stage.command)
    return same and _told(folder / _INPUTS) == checksums(stage.inputs)


def _told(file: Path) -> Any:
    return json.loads(file.read_text(encoding="utf8")) if file.is_file() else None


def checksums(inputs: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each file, and of each in a folder, by path."""
    files = [file for path in inputs for file in (sorted(path.rglob("*")) if path.is_dir() else [path])]
    found = {}
    for file in filter(Path.is_file, files):
        with file.open("rb") as stream:
            found[str(file)] = hashlib.file_digest(stream, "sha256").hexdigest()
    return found


if __name__ == "__main__":
    run(main, tyro.cli(Flags, description=__doc__))
