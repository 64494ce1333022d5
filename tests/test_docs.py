"""The documentation is held to the code: snippets run, links resolve, names exist, generated parts are up to date."""

from __future__ import annotations

import ast
import importlib
import importlib.util
import itertools
import re
import shlex
from collections.abc import Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import gymnasium as gym
import pytest

import textenv
from agents import PPO, PPOConfig, ValueHeadLM

ROOT = Path(__file__).resolve().parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
# What is not in the repository until the demo has made it.
MADE_LATER = {"docs/images/learning_curve.png", "textenv/embedded/MODEL_CARD.md"}


@pytest.fixture(scope="module")
def render() -> Any:
    spec = importlib.util.spec_from_file_location("_render", ROOT / "docs" / "_render.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def read(page: str) -> str:
    return (ROOT / page).read_text(encoding="utf8")


# ---------------------------------------------------------------------------------------------------- generated parts


def test_generated_parts_are_up_to_date(render: Any) -> None:
    assert read("docs/environment.md") == render.environment_page(), "run: python docs/_render.py"
    assert read("docs/ppo.md") == render.ppo_page(read("docs/ppo.md")), "run: python docs/_render.py"
    hacking = read("docs/reward_hacking.md")
    assert hacking == render.reward_hacking_page(hacking), "run: python docs/_render.py"


def test_every_option_has_a_text(render: Any) -> None:
    for cls, page in ((textenv.EnvOptions, "docs/environment.md"), (PPOConfig, "docs/ppo.md")):
        for field in fields(cls):
            assert f"| `{field.name}` |" in read(page)


def test_a_combination_is_legal_if_both_tables_allow_it(render: Any) -> None:
    """The page shows two small tables; this is the whole product."""
    combinations = itertools.product(
        render.KL_SOURCES, (None, render.a_policy), render.CREDITS, render.ENDS, render.PENALTIES, render.COEFFICIENTS
    )
    for source, policy, credit, end, penalty, coefficient in combinations:
        who = {"kl_source": source, "policy": policy}
        when = {"kl_credit": credit, "length_end": end, "missing_eos_penalty": penalty}
        both = render.legal(**who) and render.legal(**when)
        assert render.legal(**who, **when, kl_coef=coefficient) == both, (who, when, coefficient)


def test_a_google_section_is_read(render: Any) -> None:
    text = "Does.\n\nArgs:\n    first: One\n        and more.\n    second: Two.\n\nReturns:\n    It."
    assert render.google_section(text, "Args") == {"first": "One and more.", "second": "Two."}


# ---------------------------------------------------------------------------------------------------- Python blocks


@dataclass(frozen=True)
class Block:
    """A fenced block of a page."""

    language: str
    code: str
    line: int
    skip: str | None


FENCE = re.compile(r"(?:<!-- skip: (?P<skip>[^>]+) -->\n)?^```(?P<language>\w*)\n(?P<code>.*?)^```$", re.M | re.S)


def blocks(text: str) -> Iterator[Block]:
    for match in FENCE.finditer(text):
        line = text.count("\n", 0, match.start("code"))
        yield Block(match["language"], match["code"], line, match["skip"])


def run_page(page: Path) -> None:
    """Run the Python blocks of a page as one program, one update where it says many."""
    namespace: dict[str, Any] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf8")):
        if block.language == "python" and not block.skip:
            code = re.sub(r"\.learn\(\d+", ".learn(1", block.code)
            exec(compile("\n" * block.line + code, str(page), "exec"), namespace)  # lines as in the page


@pytest.mark.parametrize(
    "name", ["README.md", "docs/evaluation.md", pytest.param("docs/quickstart.md", marks=pytest.mark.slow)]
)
def test_snippets_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    for source in ("PROMPTS", "HELDOUT"):  # a few of each are enough
        short = tmp_path / f"{source}.txt"
        short.write_text(
            "\n".join(getattr(textenv.embedded, source).read_text("utf8").splitlines()[:16]) + "\n", "utf8"
        )
        monkeypatch.setattr(textenv.embedded, source, short)
    monkeypatch.chdir(tmp_path)
    run_page(ROOT / name)


def test_a_failing_snippet_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.md"
    page.write_text("```python\nx = 1\n```\n\n<!-- skip: no -->\n```python\nno\n```\n\n```python\nassert x == 2\n```\n")
    with pytest.raises(AssertionError) as caught:
        run_page(page)
    assert caught.traceback[-1].lineno == 10  # counted from 0: the assertion's line of the page


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_blocks_are_python(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf8")):
        assert block.language in ("python", "sh", ""), f"{page.name}:{block.line}"
        if block.language == "python":
            ast.parse(block.code)


# ---------------------------------------------------------------------------------------------------- commands


def commands() -> Iterator[list[str]]:
    for page in PAGES:
        for block in blocks(page.read_text(encoding="utf8")):
            if block.language == "sh":
                for line in block.code.replace("\\\n", " ").splitlines():
                    yield shlex.split(line, comments=True)


def test_make_targets_exist() -> None:
    targets = set(re.findall(r"^([\w-]+):", read("Makefile"), re.M))
    named = {words[1] for words in commands() if words[:1] == ["make"]}
    assert {"demo", "test"} <= named <= targets


def test_scripts_take_the_flags_that_the_pages_give_them() -> None:
    tyro = pytest.importorskip("tyro")
    seen = set()
    for words in commands():
        scripts = [word for word in words if word.startswith("scripts/")]
        if scripts:
            name = Path(scripts[0]).stem
            tyro.cli(importlib.import_module(f"scripts.{name}").Flags, args=words[words.index(scripts[0]) + 1 :])
            seen.add(name)
    assert {"train_ppo", "evaluate", "chat"} <= seen


# ---------------------------------------------------------------------------------------------------- links and names


def anchors(text: str) -> set[str]:
    """Of the headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", text), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


def broken_links(page: Path, text: str) -> list[str]:
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", FENCE.sub("", text)):
        if re.match(r"https?://", target):
            continue
        name, _, anchor = target.partition("#")
        file = page.parent / name if name else page
        missing = not file.exists() and file.resolve().relative_to(ROOT).as_posix() not in MADE_LATER
        if missing or (anchor and anchor not in anchors(file.read_text(encoding="utf8"))):
            broken.append(target)
    return broken


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_resolve(page: Path) -> None:
    assert broken_links(page, page.read_text(encoding="utf8")) == []


def test_what_the_demo_makes_is_there_with_the_embedded_models() -> None:
    if not textenv.embedded.STORYTELLER.exists():
        pytest.skip("the embedded models are not made yet")
    assert [name for name in MADE_LATER if not (ROOT / name).exists()] == []


def test_broken_links_are_found() -> None:
    text = "[a](design.md#invariants) [b](design.md#nothing) [c](nothing.md) [d](https://example.org/x)"
    assert broken_links(ROOT / "docs" / "index.md", text) == ["design.md#nothing", "nothing.md"]


def test_the_tests_that_the_pages_name_exist() -> None:
    named = [match for page in PAGES for match in re.findall(r"tests/(test_\w+\.py)::(\w+)", page.read_text("utf8"))]
    assert named
    defined = {
        (file.name, node.name)
        for file in (ROOT / "tests").glob("test_*.py")
        for node in ast.parse(file.read_text(encoding="utf8")).body
        if isinstance(node, ast.FunctionDef)
    }
    assert [pair for pair in named if pair not in defined] == []


def test_the_files_that_the_pages_name_exist() -> None:
    for page in PAGES:
        for name in re.findall(r"`((?:textenv|agents|scripts|tests|docs)/[\w/]+\.(?:py|md))`", page.read_text("utf8")):
            assert (ROOT / name).exists(), f"{page.name}: {name}"


# ---------------------------------------------------------------------------------------------------- metrics


@pytest.fixture
def logged(tiny_lm_folder: Path, tiny_tokenizer: Any) -> set[str]:
    """The keys of an update with an evaluation, on tiny random models."""
    env = gym.make(
        "RLHF-Text-v0",
        reference=tiny_lm_folder,
        reward=lambda prompts, responses: [float(len(response)) for response in responses],
        prompts=[[5, 6], [7]],
        max_new_tokens=4,
    )
    policy = ValueHeadLM.from_pretrained(tiny_lm_folder)
    agent = PPO(policy, env, PPOConfig(batch_episodes=4, minibatches=2, eval_every=1), eval_prompts=[[5]])
    return set(agent.learn(1)[0])


def defined_metrics(text: str) -> set[str]:
    """First cells of the tables between the headings Metrics and Implementation details."""
    section = text.split("\n## Metrics\n")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([\w/]+)` \|", section, re.M))


def test_every_logged_metric_is_defined(logged: set[str]) -> None:
    assert defined_metrics(read("docs/ppo.md")) == logged
