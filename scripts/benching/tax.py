"""What stepping the environment token by token costs, against bare generation and one scoring pass."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LogitsProcessor

from agents import ValueHeadLM
from agents.prefix import PrefixNetwork
from agents.sampling.draw import draw
from scripts.benching.models import FreeScore, story_model
from scripts.benching.timing import Competitor, Timing, measure, table
from textenv.logprobs import selected_logprobs

ROWS, PROMPT, TOKENS, KL_COEF = 64, 8, 48, 0.1
STOP, STOP_PROBABILITY = 1, 1 / 48
CREDITS = ("sequence", "token")

_TEXT = """## Gymnasium tax

Stepping {rows} rows token by token, `obs_type="torch"` (a policy with a prefix cache, a reference, a score when a
response ends), against `model.generate` of transformers, one scoring pass of the reference and the same scores. The
same number of useful tokens on both sides: {rows} responses of {tokens} tokens to prompts of {prompt} ({model});
*random ends*: each token is the stop token with probability 1/{tokens}, a row begins anew in the same step
(`SAME_STEP`), and `generate` runs whole batches until all have stopped.

"""


def run(rounds: int, model: Path | None, tell: Callable[[str], None]) -> tuple[str, list[Timing]]:
    """Measure; the text of the page, and what was found."""
    folder = story_model(model)
    timings, tables = [], []
    for ends in (False, True):
        world = World(folder, ends)
        rivals = [Competitor(world.name("generate"), lambda world=world: world.generate)]
        rivals += [
            Competitor(
                world.name(f"step, kl_credit={credit}"), lambda world=world, credit=credit: world.stepper(credit)
            )
            for credit in CREDITS
        ]
        found = measure(rivals, rounds, tell)
        timings += found
        tables.append(table(found, [world.name("generate")]))
    text = _TEXT.format(rows=ROWS, tokens=TOKENS, prompt=PROMPT, model=folder.name)
    return text + "\n".join(tables) + "\n", timings


class World:
    """The models, prompts and ends of responses that all competitors have in common."""

    def __init__(self, folder: Path, ends: bool) -> None:
        """Load; `ends`: whether responses stop at random."""
        self.folder, self.ends = folder, ends
        self.policy: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        self.reference: Any = AutoModelForCausalLM.from_pretrained(folder).eval()
        generator = torch.Generator().manual_seed(0)
        width = self.policy.config.vocab_size
        self.prompts = torch.randint(3, width, (ROWS, PROMPT), generator=generator)
        self.useful = int(self.generate()) if ends else ROWS * TOKENS

    def name(self, what: str) -> str:
        """A competitor's, which says how responses end."""
        return f"{what}, random ends" if self.ends else what

    @torch.no_grad()
    def generate(self) -> int:
        """Whole responses from transformers, then one scoring pass; how many tokens count."""
        torch.manual_seed(0)
        found = self.policy.generate(
            self.prompts,
            attention_mask=torch.ones_like(self.prompts),
            do_sample=True,
            temperature=1.0,
            top_k=0,
            top_p=1.0,
            max_new_tokens=TOKENS,
            eos_token_id=STOP if self.ends else None,
            pad_token_id=0,
            logits_processor=[_Stops()] if self.ends else None,
        )
        targets = found[:, PROMPT:]
        stopped = (targets == STOP).int() * self.ends
        mask = stopped.cumsum(1) - stopped == 0
        hidden = self.reference.base_model(found).last_hidden_state[:, PROMPT - 1 : -1]
        selected_logprobs(hidden, self.reference.get_output_embeddings(), targets, mask=mask)
        responses = [row[:count] for row, count in zip(targets.tolist(), mask.sum(1).tolist(), strict=True)]
        FreeScore()(self.prompts.tolist(), responses)
        return int(mask.sum())

    def stepper(self, credit: str) -> Callable[[], object]:
        """The environment and a policy with a prefix cache; a call steps as many tokens as `generate` made."""
        network = PrefixNetwork(ValueHeadLM(self.policy))
        envs = gym.make_vec(
            "RLHF-Text-v0",
            num_envs=ROWS,
            reference=str(self.folder),
            reward=FreeScore(),
            prompts=self.prompts.tolist(),
            max_new_tokens=TOKENS,
            stop_token_ids=[STOP] if self.ends else [],
            kl_coef=KL_COEF,
            kl_credit=credit,
            obs_type="torch",
        )
        steps = round(self.useful / ROWS)

        generator = torch.Generator().manual_seed(0)
        observation, _ = envs.reset(seed=0)

        @torch.no_grad()
        def work() -> None:
            nonlocal observation  # rows begin anew by themselves: each call goes on where the last one stopped
            for _ in range(steps):
                logits = network.next_logits(observation["input_ids"], observation["attention_mask"])
                if self.ends:
                    logits = _Stops()(None, logits)
                uniforms = torch.rand(ROWS, generator=generator, dtype=torch.float64)
                actions, _ = draw(logits, uniforms, 1.0)
                observation, *_ = envs.step(actions)

        return work


class _Stops(LogitsProcessor):
    """Gives the stop token its probability, whatever the model thinks."""

    def __call__(self, input_ids: Any, scores: Tensor) -> Tensor:
        scores = scores.clone()
        scores[:, STOP] = -torch.inf
        scores[:, STOP] = scores.logsumexp(1) + math.log(STOP_PROBABILITY / (1 - STOP_PROBABILITY))
        return scores
