"""Type a beginning, read how a saved policy goes on.

python scripts/chat.py --model runs/ppo/policy
python scripts/chat.py --prompt "Once upon a time" --samples 3
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import tyro
from rich.console import Console

import textenv
from agents import TransformersSampler, ValueHeadLM
from scripts.options import device_of, run
from textenv.models import load_tokenizer
from textenv.rewards.base import TextDecoder


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
    stops = [] if eos is None else [eos]
    sampler, decode = TransformersSampler(policy), TextDecoder(tokenizer, frozenset(stops))
    seed = flags.seed
    while True:
        prompt = flags.prompt if flags.prompt is not None else _ask(console)
        if not prompt:
            return
        ids = [tokenizer(prompt)["input_ids"]] * flags.samples
        drawn = sampler.sample(
            ids,
            max_new_tokens=flags.max_new_tokens,
            stop_token_ids=stops,
            temperature=flags.temperature,
            seed=seed,
        )
        for start, response in zip(*decode(ids, drawn.responses), strict=True):
            console.print(f"[dim]{_plain(start)}[/][bold]{_plain(response)}[/]", highlight=False, end="\n\n")
        seed += 1
        if flags.prompt is not None:
            return


def _ask(console: Console) -> str:
    try:
        return console.input("[cyan]›[/] ").strip()
    except (EOFError, KeyboardInterrupt):
        return ""


def _plain(text: str) -> str:
    """Model output is no markup."""
    return text.replace("[", r"\[")


if __name__ == "__main__":
    run(main, tyro.cli(Flags, description=__doc__))
