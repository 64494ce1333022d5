"""The page of the algorithms is what the code says: its blocks run, its table and its names are up to date."""

from __future__ import annotations

import importlib.util
import re
from pathlib import Path

import pytest

import textenv
from agents import algorithms
from agents.algorithms import RECIPES
from tests.agent_fixtures import make_algorithm_agent, small_algorithm
from tests.test_docs import ROOT, blocks, read, run_page

PAGE = "docs/algorithms.md"


def test_the_table_of_recipes_is_up_to_date() -> None:
    spec = importlib.util.spec_from_file_location("_render", ROOT / "docs" / "_render.py")
    assert spec is not None and spec.loader is not None
    render = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(render)
    page = read(PAGE)
    assert page == render.algorithms_page(page), "run: python docs/_render.py"
    assert "| `rloo` | `Scaled(LeaveOneOut())` | `Clipped()` |" in page


def test_the_blocks_run_and_that_of_ones_own_is_short(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / PAGE)
    own = [block.code for block in blocks(read(PAGE)) if "def " in block.code]
    assert len(own) == 1
    assert "Algorithm(best_of_group, weighted" in own[0]
    assert len([line for line in own[0].splitlines() if line.strip()]) < 20


def test_every_recipe_has_a_section_and_every_component_a_row() -> None:
    page = read(PAGE)
    assert set(re.findall(r"^## ([a-z0-9_+]+)$", page, re.M)) == set(RECIPES)
    kinds = [name for name in algorithms.__all__ if isinstance(getattr(algorithms, name), type)]
    shown = [name for name in kinds if name not in ("Aggregation", "Algorithm", "Targets", "ValueLoss")]
    missing = [name for name in shown if f"`{name}(" not in page and f"={name}()" not in page]
    assert len(shown) > 15 and missing == []


def metrics_of(page: str) -> set[str]:
    section = read(page).split("\n## Metrics\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([\w/]+)` \|", section, re.M))


def test_every_metric_of_every_recipe_is_defined_once() -> None:
    from dataclasses import replace

    logged: set[str] = set()
    for name in RECIPES:
        algorithm = small_algorithm(name)
        if name == "grpo":
            algorithm = replace(algorithm, kl_loss=algorithms.ReferenceKL())
        logged |= set(make_algorithm_agent(algorithm).learn(1)[0])
    shared, own = metrics_of("docs/ppo.md"), metrics_of(PAGE)
    assert own == logged - shared
    assert not own & shared
