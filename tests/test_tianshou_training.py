"""Tianshou's algorithms for real: each learns a toy reward; natural gradients are natural; the script runs."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tianshou.utils import TensorboardLogger
from torch.distributions import kl_divergence

from agents import ValueHeadLM
from agents.adapters.tianshou_bridge import DEFAULTS, AdamFactory, make_algorithm, train, use_eager_attention
from agents.adapters.tianshou_bridge.episodes import whole_episodes
from tests.agent_fixtures import make_policy
from tests.conftest import make_llama
from tests.tianshou_fixtures import WARNINGS, collect, episodes_in, make_setup, make_venv

# TRPO says when its line search goes back.
TRPO = ["ignore:Backtracking to step:UserWarning", "ignore:Line search failed:UserWarning"]
pytestmark = [pytest.mark.filterwarnings(line) for line in [*WARNINGS, *TRPO]]
RATES = {"ppo": 3e-3, "a2c": 1e-2, "reinforce": 1e-2, "npg": 3e-3, "trpo": 3e-3, "dqn": 3e-3, "sac": 3e-3}
VARIANTS = [(name, True) for name in RATES] + [("ppo", False), ("dqn", False)]


@pytest.mark.parametrize(("name", "by_episode"), VARIANTS)
def test_it_learns(name: str, by_episode: bool) -> None:
    """Even ids are rewarded, β = 0.01: from a half to most of them, in a few hundred episodes."""
    lm = make_llama(initializer_range=0.1)
    off = name in ("dqn", "sac")
    options = {"kl_source": "reference"} if off else {}
    venv = make_venv(16, k=16 if off else 0, lm=copy.deepcopy(lm), kl_coef=0.01, stop_token_ids=[1], **options)
    policy = make_policy(lm, "shared" if name in ("npg", "trpo", "sac") else "separate")
    if name in ("npg", "trpo"):
        use_eager_attention(policy)
    config = replace(
        DEFAULTS[name],
        iterations=12,
        episodes=32,
        learning_rate=RATES[name],
        by_episode=by_episode,
        gradient_steps=8,
        target_update_freq=8,
        buffer_episodes=128,
        tau=0.2,
        trust_region_size=0.3,
        max_kl=0.2,
    )
    history = train(make_algorithm(name, policy, venv, config))
    start, end = (sum(m["objective"] for m in part) / len(part) for part in (history[:1], history[-3:]))
    assert 0.3 < start < 0.65
    assert end > start + 0.15, [round(m["objective"], 2) for m in history]


def test_a_run_repeats_itself_and_depends_on_its_seed() -> None:
    curves = [
        [m["return/mean"] for m in train(make_setup("ppo", iterations=3, learning_rate=1e-2, seed=seed))]
        for seed in (0, 0, 1)
    ]
    assert curves[0] == curves[1] != curves[2]


def test_a_callback_may_end_it_and_tianshous_logger_is_told(tmp_path: Path) -> None:
    from torch.utils.tensorboard import SummaryWriter

    logger = TensorboardLogger(SummaryWriter(str(tmp_path)), training_interval=1, update_interval=1)
    history = train(make_setup("ppo", iterations=5), logger=logger, callback=lambda i, _: i < 2)
    logger.finalize()
    assert len(history) == 2
    assert {"score/mean", "kl/sequence", "objective", "loss/vf_loss", "time/collect"} <= history[0].keys()
    assert list(tmp_path.iterdir())


# ------------------------------------------------------------------------------------------------- natural gradients


def test_a_fisher_vector_product_is_the_hessian_of_the_kl() -> None:
    """Tianshou's own, against central differences of the KL's gradient in float64, one plain forward an episode."""
    setup = make_setup("npg", rows=2, gpt2=True)  # Llama's norms are in float32 whatever its type
    collect(setup, episodes=3)
    algorithm, actor = setup.algorithm, setup.algorithm.policy.actor
    batch, _ = setup.collector.buffer.sample(0)
    law = algorithm.policy(batch).dist
    with torch.no_grad():
        old = algorithm.policy(batch).dist
    gradient = algorithm._get_flat_grad(kl_divergence(old, law).mean(), actor, create_graph=True)
    v = torch.randn(len(gradient), generator=torch.Generator().manual_seed(0))
    product = algorithm._MVP(v, gradient) - algorithm._damping * v

    double = copy.deepcopy(actor.lm).double()
    found = episodes_in(setup)

    def laws(model: Any) -> torch.Tensor:
        rows = [
            model(input_ids=torch.tensor([e["prompt"] + e["response"]])).logits[0, len(e["prompt"]) - 1 : -1]
            for e in found
        ]
        return torch.cat(rows).log_softmax(-1)

    with torch.no_grad():
        before = laws(double)

    def kl_gradient(step: float) -> torch.Tensor:
        moved, at = copy.deepcopy(double), 0
        with torch.no_grad():
            for p in moved.parameters():
                p.add_(step * v[at : at + p.numel()].double().view_as(p))
                at += p.numel()
        kl = (before.exp() * (before - laws(moved))).sum(-1).mean()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(kl, list(moved.parameters()))])

    expected = (kl_gradient(1e-6) - kl_gradient(-1e-6)) / 2e-6
    assert float(expected.norm()) > 0.1
    # float32 against float64, and curvature over the step.
    assert float((product - expected).norm() / expected.norm()) < 1e-3


def test_fused_attention_has_no_second_derivative() -> None:
    """Why eager attention is asked for."""
    policy = make_policy()
    with pytest.raises(ValueError, match="use_eager_attention"):
        make_algorithm("trpo", policy, make_venv())
    setup = make_setup("npg", rows=2)
    setup.algorithm.policy.actor.lm.set_attn_implementation("sdpa")
    collect(setup, episodes=2)
    batch, _ = setup.collector.buffer.sample(0)
    law = setup.algorithm.policy(batch).dist
    with torch.no_grad():
        old = setup.algorithm.policy(batch).dist
    with pytest.raises(RuntimeError, match="no second derivative"):
        kl = kl_divergence(old, law).mean()
        gradient = setup.algorithm._get_flat_grad(kl, setup.algorithm.policy.actor, create_graph=True)
        setup.algorithm._MVP(torch.ones_like(gradient), gradient)


def test_natural_gradients_touch_the_language_model_and_its_critic_step_the_head_alone() -> None:
    setup = make_setup("npg", critic="shared+")
    policy = setup.algorithm.policy.actor.reader.network.policy
    assert {id(p) for p in setup.algorithm.policy.actor.parameters()} == {id(p) for p in policy.lm.parameters()}
    assert {id(p) for p in setup.algorithm.critic.parameters()} == {id(p) for p in policy.value_head.parameters()}


# ------------------------------------------------------------------------------------------------- the optimizer


def test_actor_and_critic_are_clipped_apart_and_the_rate_falls() -> None:
    setup = make_setup("ppo", critic="separate+", max_grad_norm=0.01, iterations=4)
    optimizer = setup.algorithm.optim._optim
    assert [len(g["params"]) > 0 for g in optimizer.param_groups] == [True, True]
    norms: list[list[float]] = []
    optimizer.register_step_pre_hook(
        lambda o, *_: norms.append(
            [float(torch.cat([p.grad.flatten() for p in g["params"]]).norm()) for g in o.param_groups]
        )
    )
    rates: list[float] = []
    train(setup, callback=lambda *_: rates.append(optimizer.param_groups[0]["lr"]))
    assert all(n <= 0.01 * (1 + 1e-4) for pair in norms for n in pair)
    assert sum(n > 0.0099 for pair in norms for n in pair) > len(norms)
    assert rates == pytest.approx([2e-4 * f for f in (0.75, 0.5, 0.25, 1.0)])  # the next run would begin anew
    plain = AdamFactory(1e-3, max_grad_norm=None).create_instances(torch.nn.Linear(2, 2))
    assert plain[1] is None and len(plain[0].param_groups) == 1


def test_lora_learns_its_adapters_only() -> None:
    peft = pytest.importorskip("peft")
    venv = make_venv()
    lora = peft.LoraConfig(r=2, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM")
    policy = make_policy(peft.get_peft_model(make_llama(), lora))
    use_eager_attention(policy)
    setup = make_algorithm("npg", policy, venv, replace(DEFAULTS["npg"], iterations=1, episodes=4))
    before = {name: p.clone() for name, p in policy.named_parameters()}
    train(setup)
    moved = {name for name, p in policy.named_parameters() if not torch.equal(p, before[name])}
    assert moved and all("lora_" in name or "value_head" in name for name in moved)


# ------------------------------------------------------------------------------------------------- page and script


def test_the_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import textenv
    from tests.test_docs import ROOT, run_page

    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / "docs" / "tianshou.md")


@pytest.mark.parametrize("name", ["ppo", "trpo", "dqn", "sac"])
def test_the_script_runs(name: str, tmp_path: Path, tiny_lm_folder: Path, tiny_reward_folder: Path) -> None:
    pytest.importorskip("tyro")
    from scripts import train_tianshou
    from scripts.trained import TrainedWith

    (tmp_path / "prompts.txt").write_text("w5 w6\nw7\nw8 w9 w10\n")
    options = {
        "algorithm": name,
        "top-k": 8,
        "rows": 2,
        "threads": 1,
        "out": tmp_path / "out",
        "config.iterations": 2,
        "config.episodes": 4,
        "config.gradient-steps": 2,
        "env.reference": tiny_lm_folder,
        "env.reward": tiny_reward_folder,
        "env.prompts": tmp_path / "prompts.txt",
        "env.heldout": tmp_path / "prompts.txt",
        "env.max-new-tokens": 4,
        "env.device": "cpu",
    }
    flags = train_tianshou.parse([word for key, value in options.items() for word in (f"--{key}", str(value))])
    assert flags.config.epochs == DEFAULTS[name].epochs
    train_tianshou.main(flags)
    assert (tmp_path / "out" / "report.html").exists() and list((tmp_path / "out" / "tensorboard").iterdir())
    assert len((tmp_path / "out" / "metrics.jsonl").read_text().splitlines()) == 2
    ValueHeadLM.from_pretrained(tmp_path / "out" / "policy")
    trained = TrainedWith.load(tmp_path / "out" / "policy")
    assert trained is not None and trained.updates == 2
    assert trained.env["reference"] == str(tiny_lm_folder) and trained.env["max_new_tokens"] == 4


def test_a_single_transition_never_is_a_minibatch() -> None:
    """Tianshou divides advantages by their deviation, which one number has not: NaN would reach every weight."""
    parts = whole_episodes(np.arange(5), 5)
    assert min(len(part) for part in parts) >= 2 and sorted(np.concatenate(parts)) == list(range(5))
    for by_episode in (True, False):
        setup = make_setup("ppo", env={"max_new_tokens": 1}, iterations=1, episodes=4, by_episode=by_episode)
        train(setup)
        policy = setup.algorithm.policy.actor.reader.network.policy
        assert all(bool(torch.isfinite(p).all()) for p in policy.parameters())


def test_another_run_learns_too() -> None:
    setup = make_setup("ppo", iterations=2, episodes=4)
    policy = setup.algorithm.policy.actor.reader.network.policy
    train(setup)
    before = [p.detach().clone() for p in policy.parameters()]
    train(setup)
    assert any(not torch.equal(a, b) for a, b in zip(before, policy.parameters(), strict=True))


@pytest.mark.parametrize("name", ["dqn", "sac"])
def test_candidates_of_a_cut_state_are_kept_for_its_value(name: str) -> None:
    train(make_setup(name, k=8, env={"length_end": "truncate"}, iterations=2, episodes=4))
