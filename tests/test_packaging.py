"""The wheel holds textenv and agents with their data, nothing else, and works where the repository is not."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
import zipfile
from email.parser import HeaderParser
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGES = ("textenv", "agents")
MEGABYTE = 1_000_000


def requirements() -> list[str]:
    """The mandatory requirements and those of every extra."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf8"))["project"]
    return sum(project["optional-dependencies"].values(), project["dependencies"])


def pins() -> dict[str, str]:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


def version(text: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", text))


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("wheel")
    # No build isolation: nothing is downloaded, and the backend is the pinned one.
    command = [sys.executable, "-m", "hatchling", "build", "--target", "wheel", "--directory", str(folder)]
    done = subprocess.run(command, cwd=ROOT, check=False, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (built,) = folder.glob("*.whl")
    return built


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: Path) -> None:
    sources = {
        path.relative_to(ROOT).as_posix()
        for package in PACKAGES
        for path in (ROOT / package).rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        packed = set(archive.namelist())
    metadata = {name for name in packed if name.split("/")[0].endswith(".dist-info")}
    assert packed - metadata == sources
    assert {name.split("/", 1)[1] for name in metadata} == {"METADATA", "RECORD", "WHEEL", "licenses/LICENSE"}
    assert {"textenv/__init__.py", "agents/__init__.py", "agents/report_template.html"} <= packed


def test_the_embedded_files_are_small(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        embedded = [entry for entry in archive.infolist() if entry.filename.startswith("textenv/embedded/")]
    assert any(entry.filename.endswith(".safetensors") for entry in embedded)
    assert sum(entry.file_size for entry in embedded) <= 6 * MEGABYTE


def test_the_metadata_are_those_of_the_project(wheel: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith("/METADATA"))
        metadata = HeaderParser().parsestr(archive.read(name).decode())
    assert (metadata["Name"], metadata["License-Expression"]) == ("textenv", "MIT")
    assert metadata["Requires-Python"] == ">=3.11"
    extras = {
        "train",
        "finetune",
        "lora",
        "data",
        "sklearn",
        "tianshou",
        "sb3",
        "torchrl",
        "grammar",
        "judge",
        "vllm",
        "bench",
        "test",
    }
    assert set(metadata.get_all("Provides-Extra") or []) == extras


def test_the_unpacked_wheel_works_elsewhere(wheel: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(tmp_path)
    code = (
        "import agents, gymnasium, textenv; print(agents.__file__, textenv.__file__, sep='\\n');"
        "env = gymnasium.make('RLHF-Text-v0'); env.reset(seed=0); env.step(0); env.close()"
    )
    environment = os.environ | {"PYTHONPATH": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert [Path(line).parent.parent for line in done.stdout.split()] == [tmp_path, tmp_path]


def test_bounds_are_lower_bounds() -> None:
    # vLLM's interface changes with each version: its range is closed.
    ours = [requirement for requirement in requirements() if not requirement.startswith(("textenv[", "vllm>="))]
    assert [requirement for requirement in ours if not re.fullmatch(r"[\w-]+(\[\w+\])?>=[\d.]+", requirement)] == []


def test_every_requirement_is_pinned_at_or_above_its_bound() -> None:
    pinned = {name.lower().replace("_", "-"): value for name, value in pins().items()}
    for requirement in requirements():
        name, _, bound = re.sub(r"\[.*?\]|,<.*", "", requirement).partition(">=")
        assert name == "textenv" or version(pinned[name]) >= version(bound), requirement


def test_what_was_tested_together() -> None:
    assert {"torch": "2.13.0", "transformers": "5.19.0"}.items() <= pins().items()
    assert pins()["gymnasium"].startswith("1.4.") and pins()["numpy"].startswith("2.")


def test_constraints_name_versions_only() -> None:
    lines = (ROOT / "constraints.txt").read_text(encoding="utf8").splitlines()
    assert [line for line in lines if not re.fullmatch(r"#.*|[\w.-]+==[\w.]+", line)] == []


def test_ci_runs_make_test_and_says_so_where_it_cannot_run_vllm() -> None:
    script = ROOT / ".ci" / "run"
    assert os.access(script, os.X_OK)
    text = script.read_text(encoding="utf8")
    assert "set -eu" in text and "\nmake test\n" in text and "\n  make test-vllm\nelse\n  echo '!!!" in text
