"""The shape of the code: who may import whom, names, sizes. Each check is also shown a tree that breaks it."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("textenv", "agents", "scripts")

# (who, must never import whom), by prefix of the dotted name.
FORBIDDEN = (("textenv", "agents"), ("textenv", "scripts"), ("agents", "scripts"))
CORE, ADAPTERS = "agents", "agents.adapters"

# Packages that `pip install textenv` does not bring: imported inside the function that needs them.
OPTIONAL = {
    "anyio",
    "accelerate",
    "datasets",
    "httpx2",
    "outlines_core",
    "peft",
    "pyarrow",
    "sb3_contrib",
    "sklearn",
    "stable_baselines3",
    "tenacity",
    "tensordict",
    "tianshou",
    "torchrl",
    "trl",
    "vllm",
}
TRAIN_EXTRA = {"jinja2", "matplotlib", "rich", "tensorboard", "torch.utils.tensorboard", "tyro"}
# Modules that exist only for one optional package and are themselves imported lazily.
OPTIONAL_HOMES = (
    "agents.adapters",
    "agents.sampling.vllm_sampler",
    "agents.sampling.vllm_server",
    "textenv.rewards.judge.client",
)

FILE_LINES, CLASS_LINES, FUNCTION_LINES = 300, 200, 60
# "path" or "path::name" -> (its own budget, why it needs one). To exceed a budget, add a row here and say why.
EXCEPTIONS: dict[str, tuple[int, str]] = {}


@dataclass(frozen=True)
class Import:
    """One imported name: `names` are the dotted candidates, `top` is whether importing the module runs it."""

    names: tuple[str, ...]
    top: bool
    line: int


@dataclass(frozen=True)
class Module:
    """A parsed source file."""

    name: str
    path: Path
    source: str
    tree: ast.Module
    imports: tuple[Import, ...]


def is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def walk_imports(node: ast.AST, package: list[str], top: bool) -> Iterator[Import]:
    """Every import below `node`; those in functions and under TYPE_CHECKING do not run at import time."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            yield from (Import((alias.name,), top, child.lineno) for alias in child.names)
        elif isinstance(child, ast.ImportFrom):
            parts = package[: len(package) - child.level + 1] if child.level else []
            base = ".".join(parts + ([child.module] if child.module else []))
            yield from (Import((f"{base}.{alias.name}", base), top, child.lineno) for alias in child.names)
        else:
            lazy = isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) or is_type_checking(child)
            yield from walk_imports(child, package, top and not lazy)


def read_tree(root: Path) -> dict[str, Module]:
    modules = {}
    for path in sorted(path for package in PACKAGES for path in (root / package).rglob("*.py")):
        parts = list(path.relative_to(root).with_suffix("").parts)
        package = parts[:-1]
        name = ".".join(package if parts[-1] == "__init__" else parts)
        source = path.read_text(encoding="utf8")
        tree = ast.parse(source)
        modules[name] = Module(name, path, source, tree, tuple(walk_imports(tree, package, top=True)))
    return modules


def within(name: str, *prefixes: str) -> bool:
    return any(name == prefix or name.startswith(prefix + ".") for prefix in prefixes)


def forbidden_arrows(modules: Mapping[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        for imported in module.imports:
            broken = any(within(module.name, who) and within(imported.names[0], whom) for who, whom in FORBIDDEN)
            core = within(module.name, CORE) and not within(module.name, ADAPTERS)
            if broken or (core and within(imported.names[0], ADAPTERS)):
                found.append(f"{module.name}:{imported.line} imports {imported.names[0]}")
    return found


def eager_optionals(modules: Mapping[str, Module]) -> list[str]:
    found = []
    for module in modules.values():
        banned = OPTIONAL if within(module.name, "scripts") else OPTIONAL | TRAIN_EXTRA
        if not within(module.name, *OPTIONAL_HOMES):
            tops = (imported for imported in module.imports if imported.top)
            found += [f"{module.name}:{i.line} imports {i.names[0]}" for i in tops if within(i.names[0], *banned)]
    return found


def root_imports(modules: Mapping[str, Module]) -> list[str]:
    """`import textenv` and `from textenv import Env` within textenv; `from textenv import dynamics` is a submodule."""
    found = []
    for module in modules.values():
        root = module.name.split(".")[0]
        for imported in module.imports if module.name != root else ():
            if root in imported.names and imported.names[0] not in modules.keys() - {root}:
                found.append(f"{module.name}:{imported.line} imports {imported.names[0]}")
    return found


def import_cycle(modules: Mapping[str, Module]) -> list[str]:
    """One cycle among the imports that run at import time, or an empty list."""
    graph = {}
    for module in modules.values():
        targets = (next((n for n in i.names if n in modules), None) for i in module.imports if i.top)
        graph[module.name] = {target for target in targets if target and target != module.name}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        return error.args[1]
    return []


def third_party_names(pyproject: Path) -> set[str]:
    project = tomllib.loads(pyproject.read_text(encoding="utf8"))["project"]
    requirements = sum(project["optional-dependencies"].values(), project["dependencies"])
    names = {re.split(r"[\[<>=!~; ]", requirement)[0].replace("-", "_") for requirement in requirements}
    return names - {project["name"]} | OPTIONAL


def shadowing_modules(modules: Mapping[str, Module], third_party: set[str]) -> list[str]:
    return [name for name in modules if name.split(".")[-1] in third_party]


def code_lines(node: ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef) -> int:
    """Lines of a function or class without its docstring."""
    lines = (node.end_lineno or node.lineno) - node.lineno + 1
    if ast.get_docstring(node, clean=False) is not None:
        lines -= (node.body[0].end_lineno or 0) - node.body[0].lineno + 1
    return lines


def sizes(root: Path) -> dict[str, tuple[int, int]]:
    """Place -> (lines, budget) for every file, class and function."""
    found = {}
    for module in read_tree(root).values():
        path = module.path.relative_to(root).as_posix()
        found[path] = (len(module.source.splitlines()), FILE_LINES)
        for node in ast.walk(module.tree):
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                found[f"{path}:{node.lineno} {node.name}"] = (code_lines(node), FUNCTION_LINES)
            elif isinstance(node, ast.ClassDef):
                found[f"{path}:{node.lineno} {node.name}"] = (code_lines(node), CLASS_LINES)
    return found


def over_budget(root: Path, exceptions: Mapping[str, tuple[int, str]]) -> list[str]:
    found, used = [], set()
    for place, (lines, budget) in sizes(root).items():
        key = re.sub(r":\d+ ", "::", place)
        if lines > budget and key in exceptions:
            used.add(key)
            budget = exceptions[key][0]
        if lines > budget:
            found.append(f"{place}: {lines} lines, budget {budget}")
    return found + [f"{key}: this exception is no longer needed" for key in exceptions.keys() - used]


# The project keeps its own rules.


@pytest.fixture(scope="module")
def project() -> dict[str, Module]:
    return read_tree(ROOT)


def test_the_tree_was_read(project: dict[str, Module]) -> None:
    assert {"textenv", "agents", "agents.tracking"} <= project.keys()
    assert any(imported.names[0] == "pathlib.Path" for imported in project["agents.tracking"].imports)


def test_arrows_point_downwards(project: dict[str, Module]) -> None:
    assert forbidden_arrows(project) == []


def test_optional_packages_are_imported_where_they_are_used(project: dict[str, Module]) -> None:
    assert eager_optionals(project) == []


def test_no_module_imports_its_own_package_root(project: dict[str, Module]) -> None:
    assert root_imports(project) == []


def test_no_import_cycles(project: dict[str, Module]) -> None:
    assert import_cycle(project) == []


def test_no_module_bears_a_third_party_name(project: dict[str, Module]) -> None:
    assert shadowing_modules(project, third_party_names(ROOT / "pyproject.toml")) == []


def test_sizes_stay_within_budget() -> None:
    assert over_budget(ROOT, EXCEPTIONS) == []


def test_import_leaves_optional_packages_alone() -> None:
    unwanted = sorted(OPTIONAL | {"jinja2", "matplotlib", "tensorboard", "tyro"})
    code = f"import sys, textenv, agents; print([name for name in {unwanted} if name in sys.modules])"
    bare = f"import sys, torch, transformers; print([name for name in {unwanted} if name in sys.modules])"
    ours, theirs = (
        subprocess.run([sys.executable, "-c", line], cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for line in (code, bare)
    )
    # What torch and transformers bring by themselves is not our doing.
    assert set(ast.literal_eval(ours)) <= set(ast.literal_eval(theirs))


# Each check fails on a tree that breaks its rule, and on that alone.


def make_tree(root: Path, files: Mapping[str, str]) -> dict[str, Module]:
    """Write each source to its path and read the tree."""
    for name, source in files.items():
        path = root / f"{name}.py"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source, encoding="utf8")
    return read_tree(root)


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("textenv/env", "import agents"),
        ("textenv/env", "def f():\n    from agents.ppo import PPO"),
        ("textenv/deep/env", "from scripts import train_ppo"),
        ("agents/ppo", "import scripts.train_ppo"),
        ("agents/ppo", "from agents.adapters import bridge"),
        ("agents/ppo", "from .adapters.bridge import Bridge"),
        ("agents/sampling/local", "from ..adapters import bridge"),
    ],
)
def test_a_forbidden_arrow_is_found(tmp_path: Path, module: str, source: str) -> None:
    assert len(forbidden_arrows(make_tree(tmp_path, {module: source}))) == 1


def test_permitted_arrows_are_not_reported(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "agents/ppo": "import textenv.kl\nimport agents_of_change",
            "agents/adapters/bridge": "import agents.adapters.base\nimport agents.ppo",
            "scripts/train": "import agents.adapters.bridge",
        },
    )
    assert forbidden_arrows(tree) == []


@pytest.mark.parametrize(
    "source",
    ["import vllm", "from peft.tuners import lora", "try:\n    import trl\nexcept ImportError:\n    trl = None"],
)
def test_an_eager_optional_import_is_found(tmp_path: Path, source: str) -> None:
    assert len(eager_optionals(make_tree(tmp_path, {"agents/ppo": source}))) == 1
    assert eager_optionals(make_tree(tmp_path / "home", {"agents/adapters/bridge": source})) == []


def test_the_train_extra_is_lazy_in_the_library_only(tmp_path: Path) -> None:
    tree = make_tree(
        tmp_path,
        {
            "agents/curve": "import matplotlib.figure",
            "agents/board": "from torch.utils.tensorboard import SummaryWriter",
            "agents/lazy": "def f():\n    import rich",
            "agents/typed": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import rich",
            "scripts/train": "import tyro",
        },
    )
    assert [line.split(":")[0] for line in eager_optionals(tree)] == ["agents.board", "agents.curve"]


@pytest.mark.parametrize("source", ["import textenv", "from textenv import TextEnv", "from . import TextEnv"])
def test_a_root_import_is_found(tmp_path: Path, source: str) -> None:
    assert len(root_imports(make_tree(tmp_path, {"textenv/env": source, "textenv/kl": ""}))) == 1


def test_a_submodule_import_is_no_root_import(tmp_path: Path) -> None:
    files = {"textenv/__init__": "import textenv.env", "textenv/env": "from textenv import kl", "textenv/kl": ""}
    tree = make_tree(tmp_path, files)
    assert tree.keys() == {"textenv", "textenv.env", "textenv.kl"}
    assert root_imports(tree) == []


def test_an_import_cycle_is_found(tmp_path: Path) -> None:
    files = {"agents/a": "from agents.b import x", "agents/b": "from agents import c", "agents/c": "import agents.a"}
    assert set(import_cycle(make_tree(tmp_path, files))) == {"agents.a", "agents.b", "agents.c"}


def test_a_lazy_import_closes_no_cycle(tmp_path: Path) -> None:
    files = {"agents/a": "from agents.b import x", "agents/b": "def f():\n    import agents.a"}
    assert import_cycle(make_tree(tmp_path, files)) == []


def test_a_shadowing_name_is_found(tmp_path: Path) -> None:
    files = {"agents/adapters/tianshou": "", "agents/adapters/tianshou_bridge": "", "textenv/numpy": ""}
    tree = make_tree(tmp_path, files)
    found = shadowing_modules(tree, third_party_names(ROOT / "pyproject.toml"))
    assert sorted(found) == ["agents.adapters.tianshou", "textenv.numpy"]


def test_a_size_over_budget_is_found(tmp_path: Path) -> None:
    body = "".join(f"    x{i} = {i}\n" for i in range(FUNCTION_LINES))
    docstring = '    """' + "\n" * 100 + '    """\n'
    make_tree(
        tmp_path,
        {
            "agents/long": "def f():\n" + body,
            "agents/fits": "def f():\n" + docstring + body.split("\n", 1)[1],
            "agents/wide": "class C:\n" + "".join(f"    y{i} = {i}\n" for i in range(CLASS_LINES)),
            "agents/tall": "\n" * (FILE_LINES + 1),
        },
    )
    found = over_budget(tmp_path, {})
    assert [line.split(" lines")[0] for line in found] == [
        f"agents/long.py:1 f: {FUNCTION_LINES + 1}",
        f"agents/tall.py: {FILE_LINES + 1}",
        f"agents/wide.py:1 C: {CLASS_LINES + 1}",
    ]


def test_an_exception_holds_up_to_its_own_budget_and_goes_stale(tmp_path: Path) -> None:
    make_tree(tmp_path, {"agents/tall": "\n" * (FILE_LINES + 10)})
    assert over_budget(tmp_path, {"agents/tall.py": (FILE_LINES + 10, "a table")}) == []
    assert len(over_budget(tmp_path, {"agents/tall.py": (FILE_LINES + 9, "a table")})) == 1
    assert len(over_budget(tmp_path, {"agents/tall.py": (FILE_LINES + 10, "a table"), "agents/gone.py": (1, "")})) == 1
