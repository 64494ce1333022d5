"""Train a language model with one of Tianshou's algorithms, and show what changed.

Without flags PPO trains the embedded storyteller to write happier stories. Everything goes to `runs/tianshou`:
`metrics.jsonl`, TensorBoard events by Tianshou's own logger, `samples.md`, `learning_curve.png`, `report.html`, and the
policy as a Hugging Face folder. DQN and SAC choose among the reference's `top-k` most probable tokens.

    python scripts/train_tianshou.py
    python scripts/train_tianshou.py --algorithm trpo --config.max-kl 0.01
    python scripts/train_tianshou.py --algorithm dqn --top-k 32
    python scripts/train_tianshou.py --policy.model my-sft-model --env.reward my-reward-model --env.prompts prompts.txt
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import textenv
from agents import ValueHeadLM, evaluate
from agents.adapters import tianshou_bridge as bridge
from agents.report import print_comparison, write_report
from agents.tracking import MetricsFile, Progress, Trackers, read_metrics
from scripts.options import EnvFlags, device_of, heldout_prompts, make_env, run
from scripts.trained import TrainedWith
from textenv.wrappers import VectorTopKActions

Name = Literal["ppo", "a2c", "reinforce", "npg", "trpo", "dqn", "sac"]
OFF_POLICY = ("dqn", "sac")


@dataclass(frozen=True)
class PolicyFlags:
    """The policy."""

    model: str | None = None
    """Folder or hub name of the model to train, which is also the reference unless `env.reference` names another."""
    critic: str | None = None
    """`shared` (a value head on the policy's trunk), `separate`, or the folder of a reward model to start from.

    If absent, `separate`; `shared` for SAC, whose critics are models of their own."""


@dataclass(frozen=True)
class Flags:
    """Train a language model with one of Tianshou's algorithms."""

    algorithm: Name = "ppo"
    """Which of Tianshou's."""
    policy: PolicyFlags = field(default_factory=PolicyFlags)
    env: EnvFlags = field(default_factory=EnvFlags)
    config: bridge.TianshouConfig = field(default_factory=lambda: bridge.DEFAULTS["ppo"])
    """Settings, which start from those that suit the algorithm."""
    rows: int = 64
    """Episodes that run at the same time."""
    top_k: int = 64
    """DQN and SAC: tokens to choose from in each state; 0: all."""
    out: Path = Path("runs/tianshou")
    """Folder of everything that is written."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""


def main(flags: Flags) -> None:
    """Evaluate, train, evaluate again, report."""
    from tianshou.utils import TensorboardLogger
    from torch.utils.tensorboard import SummaryWriter

    console = Console()
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    torch.manual_seed(flags.config.seed)
    policy, setup = build(flags)
    heldout = heldout_prompts(flags.env)
    shutil.rmtree(flags.out / "tensorboard", ignore_errors=True)  # or TensorBoard would mix the runs
    flags.out.mkdir(parents=True, exist_ok=True)
    model = flags.policy.model or flags.env.reference or "the embedded storyteller"
    console.print(f"[bold]{flags.algorithm.upper()}[/] of Tianshou on {model} → {flags.out}")
    console.print(f"[dim]evaluating on {len(heldout)} held-out prompts ...[/]")
    before = evaluate(policy, setup.venv.envs, heldout)
    start = time.perf_counter()
    logger = TensorboardLogger(SummaryWriter(str(flags.out / "tensorboard")), training_interval=1, update_interval=1)
    with Trackers([MetricsFile(flags.out / "metrics.jsonl"), Progress(flags.config.iterations)]) as trackers:
        bridge.train(setup, logger=logger, callback=trackers.log)
    logger.finalize()
    console.print(f"trained in {time.perf_counter() - start:.0f} s")
    policy.save_pretrained(flags.out / "policy", setup.venv.task.tokenizer)
    trained = TrainedWith.of(flags.env, flags.policy.model, run=flags.out, updates=flags.config.iterations)
    trained.save(flags.out / "policy")
    after = evaluate(policy, setup.venv.envs, heldout)
    write_report(flags.out, read_metrics(flags.out / "metrics.jsonl"), before, after, asdict(flags))
    print_comparison(console, before, after)
    console.print(f"[dim]report[/] {flags.out}/report.html   [dim]policy[/] {flags.out}/policy")
    console.print(f"[dim]talk to it[/] python scripts/chat.py --model {flags.out}/policy")


def parse(args: Sequence[str] | None = None) -> Flags:
    """The flags, the settings beginning with what suits the algorithm."""
    choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    default = Flags(algorithm=choice.algorithm, config=replace(bridge.DEFAULTS[choice.algorithm], iterations=120))
    return tyro.cli(Flags, args=args, default=default, description=__doc__)


@dataclass(frozen=True)
class Choice:
    """What the defaults of the others depend on."""

    algorithm: Name = "ppo"
    """As in `Flags`."""


def build(flags: Flags) -> tuple[ValueHeadLM, bridge.Setup]:
    """The policy, and the algorithm on it."""
    source = flags.policy.model or flags.env.reference or textenv.embedded.STORYTELLER
    policy = ValueHeadLM.from_pretrained(
        source,
        critic=flags.policy.critic or ("shared" if flags.algorithm == "sac" else "separate"),
        device=device_of(flags.env.device),
        trust_remote_code=flags.env.trust_remote_code,
    )
    if flags.algorithm in ("npg", "trpo"):
        bridge.use_eager_attention(policy)
    off_policy = flags.algorithm in OFF_POLICY
    envs: Any = make_env(
        flags.env,
        reference=flags.env.reference or flags.policy.model,
        num_envs=flags.rows,
        autoreset_mode="Disabled",
        kl_source="reference" if off_policy else None,
    )
    if off_policy and flags.top_k:
        stops = envs.unwrapped.task.stop_token_ids
        envs = VectorTopKActions(envs, flags.top_k, always=stops)
    return policy, bridge.make_algorithm(flags.algorithm, policy, envs, flags.config)


if __name__ == "__main__":
    run(main, parse())
