"""The benchmark of the PPO iteration: what its clock, its floor, TRL's trainer and the native agent do."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

from scripts.benching import ppo, ppo_trl
from scripts.benching.models import FreeScore
from scripts.benching.ppo import (
    BF16,
    SPARED,
    TRL,
    TRL_NO_GC,
    Goal,
    IterationTiming,
    NativeIteration,
    measure_task,
    section,
)
from scripts.benching.ppo_floor import FloorIteration
from scripts.benching.ppo_task import EPOCHS, MINIBATCHES, Phases, Task, random_task, story_tasks

ROWS, TOKENS, PROMPT = 4, 5, 8
STEPS = EPOCHS * MINIBATCHES

needs_trl = pytest.mark.skipif(not ppo_trl.is_there(), reason="no TRL that has a PPO is installed")
# Warnings of TRL, accelerate and their like about themselves; since TRL 1.12 (2026-11), until TRL leaves the benchmark.
others_warnings = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return random_task(tmp_path_factory.mktemp("llama"), hidden=16, layers=1, rows=ROWS, tokens=TOKENS)


def steps_taken(optimizer: Any) -> set[int]:
    return {int(state["step"]) for state in optimizer.state.values()}


def batch(*lengths: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, 1000, (len(lengths), PROMPT + max(lengths)), generator=generator)
    return ids, torch.tensor(lengths)


# ------------------------------------------------------------------------------------------------------- the clock


def test_a_part_within_a_part_is_not_counted_twice() -> None:
    # Each reading of the clock: outer starts 0, inner 1 to 4, again 5 to 6, outer ends 10.
    readings: Iterator[float] = iter([0.0, 1.0, 4.0, 5.0, 6.0, 10.0])
    phases = Phases(clock=lambda: next(readings))
    inner = phases.timed("inner", lambda: None)
    phases.timed("outer", lambda: (inner(), inner()))()
    phases.finish()
    assert phases.done == [{"inner": 4.0, "outer": 6.0}]


def test_time_is_counted_when_a_part_raises() -> None:
    readings: Iterator[float] = iter([0.0, 2.0, 3.0, 4.0])
    phases = Phases(clock=lambda: next(readings))
    with pytest.raises(ZeroDivisionError):
        phases.timed("broken", lambda: 1 / 0)()
    phases.timed("whole", lambda: None)()
    phases.finish()
    assert phases.done == [{"broken": 2.0, "whole": 1.0}]


def test_medians_leave_the_warm_up_out() -> None:
    phases = Phases()
    phases.done = [{"a": 99.0}, {"a": 1.0}, {"a": 2.0, "b": 3.0}, {"a": 6.0}]
    assert phases.medians() == {"a": 2.0, "b": 0.0}


# ------------------------------------------------------------------------------------------------------- the tasks


def test_tasks_have_prompts_of_one_length(task: Task) -> None:
    equal, ragged = story_tasks(None, rows=ROWS, tokens=TOKENS)
    for one in (task, equal, ragged):
        assert {len(prompt) for prompt in one.prompts} == {PROMPT} and len(one.prompts) >= ROWS
    assert equal.stop is None and ragged.stop is not None


def test_the_random_model_has_4_7_million_parameters(tmp_path: Path) -> None:
    # V·H twice, per layer 4·H² + 12·H² and two norms, and the last norm: 512000 + 4·(1048576 + 512) + 256
    model = AutoModelForCausalLM.from_pretrained(random_task(tmp_path).folder)
    assert sum(p.numel() for p in model.parameters()) == 4_708_608


# ------------------------------------------------------------------------------------------------------- the floor


def test_the_floor_scores_what_the_model_says(task: Task) -> None:
    ids, lengths = batch(2, 5, 1, 3)
    floor = FloorIteration(task, [(ids, lengths)], shared=False)
    model: Any = AutoModelForCausalLM.from_pretrained(task.folder)
    expected = []
    for row in (1, 3, 0, 2):  # longest first
        text = ids[row, : PROMPT + int(lengths[row])]
        laws = model(text[None]).logits[0].detach().double().log_softmax(-1)
        expected += [float(laws[place - 1, text[place]]) for place in range(PROMPT, len(text))]
    # float32 against float64 of the same float32 logits
    torch.testing.assert_close(floor.reference().double(), torch.tensor(expected).double(), atol=1e-5, rtol=0)
    assert floor.values().shape == (int(lengths.sum()), 1)


@pytest.mark.parametrize(("lengths", "pushed"), [((5, 5, 5, 5), 32 + 4 * 4), ((5, 1, 1, 1), 32 + 4), ((1, 1), 16)])
def test_the_floor_decodes_no_token_too_many(task: Task, lengths: tuple[int, ...], pushed: int) -> None:
    floor = FloorIteration(task, [batch(*lengths)], shared=True)
    tokens = []
    layer = floor.policy.get_input_embeddings()
    layer.register_forward_pre_hook(lambda module, args: tokens.append(args[0].numel()))
    drawn = floor.decode()
    assert sum(tokens) == pushed
    assert drawn.shape == (max(lengths), len(lengths))


@pytest.mark.parametrize("shared", [True, False])
def test_the_floor_takes_as_many_steps(task: Task, shared: bool) -> None:
    floor = FloorIteration(task, [batch(5, 2, 4, 1), batch(3, 3, 3, 3)], shared=shared)
    before = {name: p.detach().clone() for name, p in floor.policy.named_parameters()}
    floor()
    floor()
    assert steps_taken(floor.optimizer) == {2 * STEPS}
    assert all(not torch.equal(p, before[name]) for name, p in floor.policy.named_parameters())
    trunks = sum(p.numel() for p in floor.policy.base_model.parameters()) * (1 if shared else 2)
    heads = sum(p.numel() for p in floor.policy.lm_head.parameters()) + 16 + 1
    assert sum(p.numel() for group in floor.optimizer.param_groups for p in group["params"]) == trunks + heads
    assert [set(parts) for parts in floor.phases.done] == [{"generate", "reference", "values", "update"}] * 2


# ------------------------------------------------------------------------------------------------------- the rivals


@pytest.mark.parametrize("critic", ["shared", "separate"])
def test_the_native_agent_does_one_iteration(task: Task, critic: str) -> None:
    native = NativeIteration(task, critic)
    native()
    assert steps_taken(native.agent.optimizer) == {STEPS}
    assert set(native.phases.done[0]) == {"generate", "reference", "reward", "values", "update"}
    assert native.agent.updates == 1


@needs_trl
@others_warnings
@pytest.mark.parametrize("collect_garbage", [True, False])
def test_trl_does_one_iteration(task: Task, collect_garbage: bool) -> None:
    from trl.experimental.ppo import ppo_trainer

    names = ("batch_generation", "get_reward", "forward", "gc")
    theirs = [getattr(ppo_trainer, name) for name in names]
    trl = ppo_trl.TrlIteration(task, collect_garbage=collect_garbage)
    trl()
    assert steps_taken(trl.trainer.optimizer) == {STEPS}
    common = {"generate", "reference", "reward", "values", "update"}
    assert set(trl.phases.done[0]) == (common | {"gc"} if collect_garbage else common)
    assert [getattr(ppo_trainer, name) for name in names] == theirs


@needs_trl
@others_warnings
def test_trl_is_paid_the_same_score(task: Task) -> None:
    from trl.experimental.utils import get_reward

    trl = ppo_trl.TrlIteration(task, collect_garbage=False)
    ids, lengths = batch(5, 5, 5, 5)
    texts = torch.cat([ids, torch.full((4, 1), task.vocab_size)], 1)
    _, scores, _ = get_reward(trl.trainer.reward_model, texts, task.vocab_size, PROMPT)
    responses = [row[PROMPT : PROMPT + n].tolist() for row, n in zip(ids, lengths.tolist(), strict=True)]
    assert scores.tolist() == pytest.approx(FreeScore()([], responses))
    assert len(set(scores.tolist())) > 1


@needs_trl
@others_warnings
def test_trl_trains_and_samples_with_the_same_settings(task: Task) -> None:
    config = ppo_trl.TrlIteration(task, collect_garbage=False).trainer.args
    native = NativeIteration(task, "separate").agent
    assert (config.num_ppo_epochs, config.num_mini_batches) == (native.config.epochs, native.config.minibatches)
    assert (config.learning_rate, config.kl_coef) == (native.config.learning_rate, native.task.kl_coef)
    assert (config.temperature, config.response_length) == (
        native.task.options.temperature,
        native.task.options.max_new_tokens,
    )
    assert config.per_device_train_batch_size == native.config.batch_episodes


@others_warnings
@pytest.mark.parametrize("with_trl", [pytest.param(True, marks=needs_trl), False])
def test_all_are_measured_in_turn(task: Task, with_trl: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ppo_trl, "is_there", lambda: with_trl)
    told: list[str] = []
    found = measure_task(task, 1, told.append, bf16=True)
    names = ["native, separate", "floor, separate", "native, shared", "floor, shared", SPARED, BF16]
    assert [timing.name for timing in found] == ([TRL, TRL_NO_GC] if with_trl else []) + names
    assert len(told) == len(found)
    for timing in found:
        assert timing.task == task.name and len(timing.cpu_seconds) == 1
        # One call: parts of a whole are no more than it, and nothing long is in none of them.
        assert 0.5 * timing.cpu < sum(timing.phases.values()) <= timing.cpu
    text = section(ppo.EQUAL_GOALS, found)
    assert ("native, separate ÷ TRL, no gc" in text) == with_trl
    assert "native, shared ÷ floor, shared" in text


# ------------------------------------------------------------------------------------------------------- the page


def test_the_section_tells_ratios_and_goals() -> None:
    timings = [
        IterationTiming(TRL_NO_GC, (2.0, 4.0, 3.0), (9.0, 9.0, 9.0), "task", {"generate": 1.0, "update": 2.0}),
        IterationTiming("native, shared", (1.5, 1.0, 2.0), (9.0, 9.0, 9.0), "task", {"update": 1.25}),
    ]
    text = section((Goal("native, shared", TRL_NO_GC, 0.65), Goal(BF16, TRL_NO_GC, 0.5)), timings)
    assert "| native, shared | 1.50 | 1.00–2.00 | 0.50 |" in text
    assert "| native, shared |  | 1.250 |" in text
    # 1.5/2, 1/4, 2/3 and 4.5/9: the median is another number than the ratio of medians above.
    told = "- native, shared ÷ TRL, no gc, round by round: 0.67 (0.25–0.75, all together 0.50; goal: at most 0.65)"
    assert told in text
    assert BF16 not in text
