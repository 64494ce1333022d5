"""Train a language model with PPO or another algorithm, and show what changed.

Without flags it trains the embedded storyteller to write happier stories, evaluates it before and after on openings it
was not trained on, and writes everything to `runs/ppo`, of another algorithm to `runs/` and its name: `metrics.jsonl`,
TensorBoard events, `samples.md`, `learning_curve.png`, `report.html`, and the policy as a Hugging Face folder.

    python scripts/train_ppo.py
    python scripts/train_ppo.py --policy.model my-sft-model --env.reward my-reward-model --env.prompts prompts.txt
    python scripts/train_ppo.py --algorithm grpo --group-size 8 --ppo.learning-rate 1e-4 --out runs/grpo
    python scripts/train_ppo.py --out runs/ppo --resume
"""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Sequence
from contextlib import closing
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from typing import Any, Literal

import torch
import tyro
from rich.console import Console

import textenv
from agents import Agent, Evaluation, PPOConfig, TrainConfig, ValueHeadLM
from agents.algorithms import RECIPES, Algorithm, from_config
from agents.checkpoint import read as read_checkpoint
from agents.mismatch import SamplerMismatch
from agents.policy_files import saved_critic_kind
from agents.report import print_comparison, write_report
from agents.sampling.engine import SamplerFailure
from agents.sampling.vllm_config import VLLMConfig, VLLMServerConfig
from agents.tracking import MetricsFile, Progress, TensorBoard, Trackers, read_metrics
from scripts.options import EnvFlags, device_of, heldout_prompts, make_env, run
from scripts.samplers import SamplerName, longest, make_sampler
from textenv.rewards import RewardError

Name = Literal[
    "ppo",
    "vapo",
    "a2c",
    "reinforce",
    "reinforce_baseline",
    "reinforce++",
    "remax",
    "rloo",
    "grpo",
    "dr_grpo",
    "gspo",
]


FAILURES = (SamplerFailure, SamplerMismatch, ConnectionError, TimeoutError)
"""What may go wrong in a rollout without anybody's mistake: an engine, or a judge over HTTP."""


@dataclass(frozen=True)
class PolicyFlags:
    """The policy."""

    model: str | None = None
    """Folder or hub name of the model to train, which is also the reference unless `env.reference` names another."""
    critic: str | None = None
    """`shared` (a value head on the policy's trunk), `separate`, or the folder of a reward model to start from.

    If absent, what a saved policy has, else `separate`, or `shared` for an algorithm without a critic."""
    lora_rank: int = 0
    """Rank of LoRA adapters; 0 trains all weights. With adapters the base model is also the reference."""
    gradient_checkpointing: bool = False
    """Less memory, a third more time."""


@dataclass(frozen=True)
class Flags:
    """Train a language model with PPO or another algorithm."""

    algorithm: Name = "ppo"
    """A recipe of `agents.algorithms`; the page Algorithms of the documentation has each."""
    group_size: int | None = None
    """Responses to each prompt of a rollout; the recipe's if absent."""
    policy: PolicyFlags = field(default_factory=PolicyFlags)
    env: EnvFlags = field(default_factory=EnvFlags)
    ppo: PPOConfig = field(default_factory=lambda: PPOConfig(entropy_coef=0.05))
    """Settings of the loop, which start from those that suit the algorithm, and of PPO alone, which others refuse."""
    sampler: SamplerName = "transformers"
    """What draws responses: our loop on the model that trains, continuous batching on it, or vLLM, here or served."""
    vllm: VLLMConfig = field(default_factory=VLLMConfig)
    """vLLM's engine, or that of the server that is started."""
    servers: VLLMServerConfig = field(default_factory=VLLMServerConfig)
    """Others' servers of vLLM, and how they are reached."""
    iterations: int = 120
    """Updates to do in all."""
    save_every: int = 10
    """Updates between checkpoints; 0: at the end only."""
    out: Path = Path("runs/ppo")
    """Folder of everything that is written; of another algorithm, `runs/` and its name."""
    resume: bool = False
    """Go on from the checkpoint in `out`."""
    threads: int | None = None
    """CPU threads; PyTorch's choice if absent."""


def main(flags: Flags) -> None:
    """Load everything, and train."""
    console = Console()
    if flags.threads is not None:
        torch.set_num_threads(flags.threads)
    torch.manual_seed(flags.ppo.seed)
    try:
        agent, heldout = build(flags)
        with closing(agent.sampler):
            train(flags, console, agent, heldout)
    except FAILURES as error:
        sys.exit(f"error: {error}")


def train(flags: Flags, console: Console, agent: Agent, heldout: list[Any]) -> None:
    """Evaluate, train, evaluate again, report."""
    checkpoint, policy_folder = flags.out / "checkpoint", flags.out / "policy"
    flags.out.mkdir(parents=True, exist_ok=True)
    model = flags.policy.model or flags.env.reference or "the embedded storyteller"
    parameters = sum(p.numel() for p in agent.policy.lm.parameters()) / 1e6
    name = agent.algorithm.name.upper()
    console.print(f"[bold]{name}[/] on {model} ({parameters:.1f}M parameters, {agent.task.device}) → {flags.out}")
    if flags.resume and _differ(agent, *chosen(flags)):
        console.print("[yellow]The checkpoint's settings are kept; those of the flags differ and are ignored.[/]")
    if not flags.resume:
        shutil.rmtree(flags.out / "tensorboard", ignore_errors=True)  # or TensorBoard would mix the runs
    console.print(f"[dim]evaluating on {len(heldout)} held-out prompts ...[/]")
    before = _first_evaluation(flags.out / "before.json", agent, heldout, fresh=not flags.resume)
    start = time.perf_counter()
    with Trackers(
        [
            MetricsFile(flags.out / "metrics.jsonl", agent.updates + 1 if flags.resume else 0),
            TensorBoard(flags.out / "tensorboard", agent.updates + 1),
            Progress(flags.iterations, agent.updates),
        ]
    ) as trackers:

        def after_update(update: int, metrics: Any) -> None:
            trackers.log(update, metrics)
            if flags.save_every and update % flags.save_every == 0:
                agent.save(checkpoint)

        try:
            agent.learn(
                max(0, flags.iterations - agent.updates),
                after_update,
                folder=flags.out if agent.config.eval_every else None,
            )
        except (*FAILURES, RewardError):
            if agent.updates:  # it is as it was before the rollout: `--resume` goes on from here
                agent.save(checkpoint)
            raise
    console.print(f"trained in {time.perf_counter() - start:.0f} s")
    agent.save(checkpoint)
    agent.policy.save_pretrained(policy_folder, agent.task.tokenizer)
    after = agent.evaluate(heldout)
    after.save(flags.out / "after.json")
    rows, fixed_units = read_metrics(flags.out / "metrics.jsonl"), not agent.task.reward.learns
    write_report(flags.out, rows, before, after, asdict(flags), fixed_units=fixed_units)
    print_comparison(console, before, after)
    console.print(f"[dim]report[/] {flags.out}/report.html   [dim]policy[/] {policy_folder}")
    console.print(f"[dim]talk to it[/] python scripts/chat.py --model {policy_folder}")


def parse(args: Sequence[str] | None = None) -> Flags:
    """The flags, those of the loop beginning with what suits the algorithm."""
    choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    default = Flags()
    if choice.algorithm != default.algorithm:
        suited = PPOConfig(**asdict(RECIPES[choice.algorithm]().defaults))
        default = Flags(algorithm=choice.algorithm, ppo=suited, out=Path("runs") / choice.algorithm)
    return tyro.cli(Flags, args=args, default=default, description=__doc__)


@dataclass(frozen=True)
class Choice:
    """What the defaults of the others depend on."""

    algorithm: Name = "ppo"
    """As in `Flags`."""


def chosen(flags: Flags) -> tuple[Algorithm, TrainConfig]:
    """The algorithm, and the settings of its loop.

    Raises:
        ValueError: If a setting of PPO alone is given to another.
    """
    if flags.algorithm == "ppo" and flags.group_size is None:
        return from_config(flags.ppo), flags.ppo
    algorithm = from_config(flags.ppo) if flags.algorithm == "ppo" else RECIPES[flags.algorithm]()
    loop, shared = flags.ppo.loop, {f.name for f in fields(TrainConfig)}
    for f in fields(PPOConfig):
        value = getattr(flags.ppo, f.name)
        if flags.algorithm != "ppo" and f.name not in shared and value != f.default:
            raise ValueError(f"ppo.{f.name}: expected none, because {algorithm.name} has no such setting, got {value}")
    group_size = algorithm.group_size if flags.group_size is None else flags.group_size
    return replace(algorithm, group_size=group_size), loop


def _differ(agent: Agent, algorithm: Algorithm, config: TrainConfig) -> bool:
    """Whether a run goes on with other settings; an algorithm's `defaults` act only where there are no others."""
    return agent.config != config or replace(agent.algorithm, defaults=algorithm.defaults) != algorithm


def build(flags: Flags) -> tuple[Agent, list[Any]]:
    """The agent, new or from its checkpoint, and the held-out prompts."""
    algorithm, config = chosen(flags)
    heldout, checkpoint = heldout_prompts(flags.env), _checkpoint(flags.out) if flags.resume else None
    source = flags.policy.model or flags.env.reference or textenv.embedded.STORYTELLER
    policy = ValueHeadLM.from_pretrained(
        checkpoint or source,
        critic=None if flags.resume else _critic(flags, source, algorithm),
        device=device_of(flags.env.device),
        lora=None if flags.resume else _lora(flags.policy.lora_rank),
        gradient_checkpointing=flags.policy.gradient_checkpointing,
        trust_remote_code=flags.env.trust_remote_code,
    )
    if flags.policy.lora_rank:
        # One copy of the weights is policy and reference; it brings no tokenizer.
        options = replace(flags.env, tokenizer=flags.env.tokenizer or str(source))
        envs = make_env(options, reference=policy.reference())
    else:
        # The model that training starts from is the reference, unless another is named.
        envs = make_env(flags.env, reference=flags.env.reference or flags.policy.model)
    task = envs.unwrapped.task
    room = longest([*task.prompts, *task.tokenize(heldout)], task.options.max_new_tokens)
    sampler = make_sampler(flags.sampler, policy, flags.vllm, flags.servers, room)
    try:
        if checkpoint:
            return Agent.load(checkpoint, envs, sampler, eval_prompts=heldout, policy=policy), heldout
        return Agent(policy, envs, algorithm, config, sampler, eval_prompts=heldout), heldout
    except BaseException:
        sampler.close()
        raise


def _checkpoint(out: Path) -> Path:
    """The last whole checkpoint of a run.

    Raises:
        ValueError: If there is none.
    """
    try:
        return read_checkpoint(out / "checkpoint").folder
    except ValueError as error:
        raise ValueError(
            f"resume: expected a checkpoint in {out}, got none; leave out --resume to begin there, or give the --out of "
            f"a run that was begun ({error})"
        ) from error


def _critic(flags: Flags, source: Any, algorithm: Algorithm) -> str:
    return flags.policy.critic or saved_critic_kind(source) or ("shared" if algorithm.critic is None else "separate")


def _lora(rank: int) -> Any:
    if rank == 0:
        return None
    from peft import LoraConfig

    return LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear", task_type="CAUSAL_LM")


def _first_evaluation(path: Path, agent: Agent, heldout: list[Any], *, fresh: bool) -> Evaluation:
    """The untrained policy's; a resumed run has it on disk."""
    if not fresh and path.exists():
        return Evaluation.load(path)
    evaluation = agent.evaluate(heldout)
    evaluation.save(path)
    return evaluation


if __name__ == "__main__":
    run(main, parse())
