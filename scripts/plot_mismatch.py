"""Draw how far what samples is from what trains: vLLM in float32, in bfloat16, and with weights of some updates ago.

Each panel has the sampled tokens of a rollout of the embedded storyteller, their probability by the sampler against
that by the trainer. Needs vLLM.

    python scripts/plot_mismatch.py --out docs/images/mismatch.png
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import torch
import tyro
from matplotlib.figure import Figure

import textenv
from agents import PPO, PPOConfig, ValueHeadLM
from agents.mismatch import mismatch
from agents.sampling import Samples
from agents.sampling.vllm_sampler import VLLMConfig, VLLMSampler


@dataclass(frozen=True)
class Flags:
    """Draw the mismatch."""

    out: Path = Path("docs/images/mismatch.png")
    """The picture."""
    updates: int = 8
    """How far training is; the stale engine has not seen the last half of them."""
    episodes: int = 64
    """Of a rollout."""


class Stale:
    """A sampler that takes no weights after a while and says nothing of them: only the numbers can tell."""

    def __init__(self, inner: Any, pushes: int) -> None:
        """Pass on so many pushes."""
        self.inner, self.left = inner, pushes

    def push(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        if self.left > 0:
            self.inner.push(weights, version)
        self.left -= 1

    def sample(self, prompts: Any, **options: Any) -> Samples:
        drawn = self.inner.sample(prompts, **options)
        return Samples(drawn.responses, drawn.logprobs, drawn.finish_reasons)

    def close(self) -> None:
        self.inner.close()


def tokens(dtype: str, flags: Flags, *, stale: bool) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Probabilities of the sampled tokens by sampler and by trainer, and the KL per token."""
    policy = ValueHeadLM.from_pretrained(textenv.embedded.STORYTELLER)
    sampler: Any = VLLMSampler(policy, VLLMConfig(dtype=dtype, max_model_len=96, max_num_seqs=flags.episodes))
    pushes = flags.updates // 2 if stale else flags.updates + 1
    env = gym.make("RLHF-Text-v0", max_new_tokens=48)
    config = PPOConfig(batch_episodes=flags.episodes, lr_schedule="constant", mismatch_alarm=None)
    agent = PPO(policy, env, config, Stale(sampler, pushes))
    agent.learn(flags.updates)
    rollout = agent.collect()
    sampler.close()
    found = mismatch(rollout.old_logprobs, rollout.behavior_logprobs, rollout.mask)
    mask = rollout.mask
    return rollout.behavior_logprobs[mask].exp(), rollout.old_logprobs[mask].exp(), float(found.kl)


def main(flags: Flags) -> None:
    """Three engines, three panels."""
    torch.set_num_threads(1)
    panels = {
        "float32": tokens("float32", flags, stale=False),
        "bfloat16": tokens("bfloat16", flags, stale=False),
        f"float32, {flags.updates // 2 + 1} updates old": tokens("float32", flags, stale=True),
    }
    figure = Figure(figsize=(9.6, 3.4), layout="constrained")
    for axes, (title, (sampled, trained, kl)) in zip(figure.subplots(1, 3, sharey=True), panels.items(), strict=True):
        print(f"{title}: KL {kl:.2g} nats per token, largest gap {float((sampled - trained).abs().max()):.2g}")
        axes.plot([0, 1], [0, 1], color="0.8", linewidth=1)
        axes.scatter(sampled, trained, s=4, alpha=0.35, color="#1f4e82", linewidths=0)
        axes.set(title=f"{title}\nKL {kl:.1e} nats per token", xlabel="probability by the sampler", aspect="equal")
        axes.spines[["top", "right"]].set_visible(False)
        if title == "float32":
            axes.set_ylabel("by the trainer")
    flags.out.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(flags.out, dpi=110)


if __name__ == "__main__":
    main(tyro.cli(Flags, description=__doc__))
