"""Train a language model with PPO or another algorithm, and show what changed.

Without flags it trains the embedded storyteller to write happier stories, evaluates it before and after on openings it
was not trained on, and writes everything to `runs/ppo`, of another algorithm to `runs/` and its name: `metrics.jsonl`,
TensorBoard events, `samples.md`, `learning_curve.png`, `report.html`, and the policy as a Hugging Face folder, with
`--keep-every` also the policies on the way.

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
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
import tyro
from rich.console import Console
from rich.markup import escape

import textenv
from agents import Agent, Evaluation, PPOConfig, TrainConfig, ValueHeadLM
from agents.algorithms import RECIPES, Algorithm
from agents.checkpoint import read as read_checkpoint
from agents.mismatch import SamplerMismatch
from agents.policy_files import saved_critic_kind
from agents.report import print_comparison, write_report
from agents.sampling.engine import SamplerFailure
from agents.tracking import MetricsFile, Progress, TensorBoard, Trackers, read_metrics
from scripts.options import device_of, heldout_prompts, make_env, run
from scripts.ppo_flags import Flags, Name, chosen
from scripts.samplers import longest, make_sampler
from scripts.trained import FILE, TrainedWith, shown
from textenv.rewards import RewardError
from textenv.rewards.human import printable

FAILURES = (SamplerFailure, SamplerMismatch, ConnectionError, TimeoutError)
"""What may go wrong in a rollout without anybody's mistake: an engine, or a judge over HTTP."""


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
    policy_folder = flags.out / "policy"
    flags.out.mkdir(parents=True, exist_ok=True)
    model = escape(printable(flags.policy.model or flags.env.reference or "the embedded storyteller"))
    parameters = sum(p.numel() for p in agent.policy.lm.parameters()) / 1e6
    name = agent.algorithm.name.upper()
    console.print(f"[bold]{name}[/] on {model} ({parameters:.1f}M parameters, {agent.task.device}) → {flags.out}")
    if flags.resume:
        tell(flags, console, agent)
    else:
        for earlier in ("tensorboard", "policies", "best"):  # or TensorBoard and the frontier would mix the runs
            shutil.rmtree(flags.out / earlier, ignore_errors=True)
    console.print(f"[dim]evaluating on {len(heldout)} held-out prompts ...[/]")
    before = _first_evaluation(flags.out / "before.json", agent, heldout, fresh=not flags.resume)
    start = time.perf_counter()
    learn(flags, agent)
    console.print(f"trained in {time.perf_counter() - start:.0f} s")
    keep(flags, agent, policy_folder)
    after = agent.evaluate(heldout)
    after.save(flags.out / "after.json")
    rows, fixed_units = read_metrics(flags.out / "metrics.jsonl"), not agent.task.reward.learns
    write_report(flags.out, rows, before, after, asdict(flags), fixed_units=fixed_units)
    print_comparison(console, before, after)
    console.print(f"[dim]report[/] {flags.out}/report.html   [dim]policy[/] {policy_folder}")
    console.print(f"[dim]talk to it[/] python scripts/chat.py --model {policy_folder}")


def tell(flags: Flags, console: Console, agent: Agent) -> None:
    """Say what a resumed run does not do as it did."""
    if _differ(agent, *chosen(flags)):
        console.print("[yellow]The checkpoint's settings are kept; those of the flags differ and are ignored.[/]")
    begun, now = TrainedWith.load(_checkpoint(flags.out)), trained(flags, agent)
    if begun is None:
        console.print(f"[yellow]The checkpoint has no {FILE}: model and environment are those of the flags.[/]")
    elif begun.changed(now):
        told = f"So far the run had {shown(begun.changed(now))}; from here on it has {shown(now.changed(begun))}."
        console.print(f"[yellow]{escape(told)}[/]", highlight=False)


def learn(flags: Flags, agent: Agent) -> None:
    """Do the updates, and write metrics, checkpoints and policies on the way."""
    checkpoint, best = flags.out / "checkpoint", flags.out / "best"

    def save() -> None:
        agent.save(checkpoint)
        trained(flags, agent).save(checkpoint)

    with Trackers(
        [
            MetricsFile(flags.out / "metrics.jsonl", agent.updates + 1 if flags.resume else 0),
            TensorBoard(flags.out / "tensorboard", agent.updates + 1),
            Progress(flags.iterations, agent.updates),
        ]
    ) as trackers:

        def after_update(update: int, metrics: Any) -> None:
            trackers.log(update, metrics)
            if agent.config.eval_every and best.is_dir() and not (best / FILE).exists():
                # It may be of an earlier update, after which the run was killed.
                replace(trained(flags, agent), updates=read_checkpoint(best).state["updates"]).save(best)
            if flags.keep_every and update % flags.keep_every == 0 and update < flags.iterations:
                keep(flags, agent, flags.out / "policies" / f"{update:06}")
            if flags.save_every and update % flags.save_every == 0:
                save()

        try:
            agent.learn(
                max(0, flags.iterations - agent.updates),
                after_update,
                folder=flags.out if agent.config.eval_every and not agent.task.reward.learns else None,
            )
        except (*FAILURES, RewardError):
            if agent.updates:  # it is as it was before the rollout: `--resume` goes on from here
                save()
            raise
    save()


def keep(flags: Flags, agent: Agent, folder: Path) -> None:
    """Write the policy as it is, and what it was trained with."""
    agent.policy.save_pretrained(folder, agent.task.tokenizer)
    trained(flags, agent).save(folder)


def trained(flags: Flags, agent: Agent) -> TrainedWith:
    """What the policy is trained with."""
    lora = flags.policy.lora_rank > 0
    return TrainedWith.of(flags.env, flags.policy.model, run=flags.out, updates=agent.updates, lora=lora)


def parse(args: Sequence[str] | None = None) -> Flags:
    """The flags: the loop's begin with what suits the algorithm, a resumed run's model and environment with its own.

    Raises:
        ValueError: If there is nothing to resume, or its reward is code that nobody named here or trusts.
    """
    choice, _ = tyro.cli(Choice, args=args, return_unknown_args=True, add_help=False)
    default = Flags()
    if choice.algorithm != default.algorithm:
        suited = PPOConfig(**asdict(RECIPES[choice.algorithm]().defaults))
        default = Flags(algorithm=choice.algorithm, ppo=suited, out=Path("runs") / choice.algorithm)
    begun = TrainedWith.load(_checkpoint(choice.out or default.out)) if choice.resume else None
    if begun is None:
        return tyro.cli(Flags, args=args, default=default, description=__doc__)
    default = replace(default, policy=replace(default.policy, model=begun.model), env=begun.flags())
    flags = tyro.cli(Flags, args=args, default=default, description=__doc__)
    return replace(flags, env=begun.with_code(flags.env))


@dataclass(frozen=True)
class Choice:
    """What the defaults of the others depend on; each as in `Flags`."""

    algorithm: Name = "ppo"
    """A recipe."""
    out: Path | None = None
    """Folder of the run; the algorithm's if absent."""
    resume: bool = False
    """Whether it goes on."""


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
            f"resume: expected a checkpoint in {out}, got none; leave out --resume to begin there, or name the --out "
            f"of a run that was begun ({error})"
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
    run(lambda args: main(parse(args)), None)
