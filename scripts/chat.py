"""Type a beginning, read how a saved policy goes on.

python scripts/chat.py --model runs/ppo/policy
python scripts/chat.py --prompt "Once upon a time" --samples 3

How `train_ppo.py` sampled from the policy is found beside it, and stands for flags that are not given.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape

import textenv
from agents import TransformersSampler, ValueHeadLM
from scripts.options import device_of, run
from scripts.trained import TrainedWith, shown
from textenv.models import load_tokenizer
from textenv.prompts import tokenize_prompts
from textenv.rewards.base import TextDecoder
from textenv.types import FinishReason

SAMPLING = ("max_new_tokens", "temperature", "stop_token_ids", "chat_template")
"""Settings of training that a chat goes by."""


@dataclass(frozen=True)
class Flags:
    """Sample from a policy."""

    model: str | None = None
    """Folder or hub name; the embedded storyteller if absent."""
    prompt: str | None = None
    """Go on from this once, instead of asking."""
    samples: int = 1
    """Continuations of each prompt."""
    max_new_tokens: int = 80
    """Longest continuation."""
    temperature: float = 1.0
    """Lower is safer, higher is wilder."""
    stop_token_ids: tuple[int, ...] | None = None
    """Ids that end a continuation; the tokenizer's EOS if absent."""
    chat_template: bool = False
    """Whether a prompt becomes what the user says in the tokenizer's chat template."""
    seed: int = 0
    """Of the samples."""
    device: str = "auto"
    """Where the model runs."""
    trust_remote_code: bool = False
    """Whether a model folder may bring Python code."""


def main(flags: Flags) -> None:
    """Answer one prompt, or ask for prompts until the input ends."""
    torch.set_grad_enabled(False)
    console, source = Console(), flags.model or textenv.embedded.STORYTELLER
    policy = ValueHeadLM.from_pretrained(  # an adapter in the folder is loaded too
        source, device=device_of(flags.device), trust_remote_code=flags.trust_remote_code
    )
    tokenizer = load_tokenizer(source, argument="model")
    eos: Any = tokenizer.eos_token_id
    stops = flags.stop_token_ids
    if stops is None:
        stops = () if eos is None else (eos,)
    sampler, decode = TransformersSampler(policy), TextDecoder(tokenizer, frozenset(stops))
    trained, seed = TrainedWith.load(source), flags.seed
    if trained is not None:
        taken = {name: getattr(flags, name) for name in SAMPLING if trained.env[name] == getattr(flags, name)}
        console.print(f"[dim]as it was trained: {escape(shown(taken))}[/]", highlight=False)
    while True:
        prompt = flags.prompt if flags.prompt is not None else _ask(console)
        if not prompt:
            return
        ids = flags.samples * tokenize_prompts(
            [prompt], tokenizer, vocab_size=policy.vocab_size, chat_template=flags.chat_template
        )
        drawn = sampler.sample(
            ids,
            max_new_tokens=flags.max_new_tokens,
            stop_token_ids=stops,
            temperature=flags.temperature,
            seed=seed,
        )
        for start, response, reason in zip(*decode(ids, drawn.responses), drawn.finish_reasons, strict=True):
            cut = " [dim]…[/]" if reason == FinishReason.LENGTH else ""
            console.print(f"[dim]{_plain(start)}[/][bold]{_plain(response)}[/]{cut}", highlight=False, end="\n\n")
        seed += 1
        if flags.prompt is not None:
            return


def parse(args: Sequence[str] | None = None) -> Flags:
    """The flags, those of sampling beginning with what the policy was trained with.

    Raises:
        ValueError: If another version wrote that.
    """
    choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    trained, default = None if choice.model is None else TrainedWith.load(choice.model), Flags()
    if trained is not None:
        default = replace(default, **{name: trained.env[name] for name in SAMPLING})
    return tyro.cli(Flags, args=args, default=default, description=__doc__)


@dataclass(frozen=True)
class Choice:
    """What the defaults of the others depend on."""

    model: str | None = None
    """As in `Flags`."""


def _ask(console: Console) -> str:
    try:
        return console.input("[cyan]›[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _plain(text: str) -> str:
    """Model output is no markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    run(lambda args: main(parse(args)), None)
