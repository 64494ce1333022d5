"""What a policy was trained with: a small file in its folder, by which evaluations and chats ask it alike."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from scripts.options import EnvFlags
from textenv.rewards.human import printable

FILE = "textenv.json"
_FORMAT = 1
_PATHS = ("reference", "reward", "heldout", "tokenizer")
_PROMPTS = ("heldout", "prompt_column", "prompt_strict")
SETTINGS = (
    *_PATHS,
    "prompt_column",
    "prompt_strict",
    "chat_template",
    "max_prompt_tokens",
    "prompt_overflow",
    "max_new_tokens",
    "stop_token_ids",
    "temperature",
    "dtype",
)
"""Flags of the environment that an evaluation needs. Whether code is trusted is nothing that a file may say."""


@dataclass(frozen=True)
class TrainedWith:
    """One policy of one run."""

    env: Mapping[str, Any]
    """The `SETTINGS`; folders and files that were there by their whole paths."""
    run: str
    """Folder of the run."""
    updates: int
    """Done when it was written."""
    from_reference: bool
    """Whether the run began as the reference."""

    @classmethod
    def of(cls, env: EnvFlags, model: str | None, *, run: Path, updates: int, lora: bool = False) -> TrainedWith:
        """The settings of a run as its flags give them, the reference named.

        Args:
            env: Its flags of the environment.
            model: What it began with; None: `env.reference`, or else the embedded storyteller.
            run: Its folder.
            updates: Done so far.
            lora: Whether it trained adapters: the model under them is then the reference, whatever `env` says.
        """
        apart = not lora and None not in (model, env.reference) and model != env.reference
        reference = env.reference if apart else model or env.reference
        return cls(_settings(replace(env, reference=reference)), str(run.resolve()), updates, not apart)

    def save(self, folder: Path) -> None:
        """Write it beside a policy."""
        text = json.dumps({"format": _FORMAT, **asdict(self)}, indent=2)
        (folder / FILE).write_text(text + "\n", encoding="utf8")

    @classmethod
    def load(cls, folder: str | Path) -> TrainedWith | None:
        """What was saved beside a policy; None where nothing was, or the name is no folder's.

        Raises:
            ValueError: If the file is another version's, or broken.
        """
        path = Path(folder) / FILE
        if not path.is_file():
            return None
        try:
            saved = json.loads(path.read_text(encoding="utf8"))
            form, env = saved.pop("format"), {name: saved["env"].pop(name) for name in SETTINGS}
            if form != _FORMAT or saved.pop("env"):
                raise ValueError(f"format {form}")
            stops = env["stop_token_ids"]
            return cls({**env, "stop_token_ids": None if stops is None else tuple(stops)}, **saved)
        except (ValueError, LookupError, TypeError, AttributeError) as error:
            wanted = f"model: expected a {FILE} of format {_FORMAT}"
            raise ValueError(f"{wanted}, got another in {folder} ({error})") from error

    def flags(self) -> EnvFlags:
        """Those of an evaluation that asks as training did."""
        return replace(EnvFlags(), **self.env)

    def kept(self, env: EnvFlags) -> dict[str, Any]:
        """What these flags have of it that is no default."""
        default, given = _settings(EnvFlags()), _settings(env)
        return {name: value for name, value in self.env.items() if value == given[name] != default[name]}

    def otherwise(self, env: EnvFlags) -> dict[str, Any]:
        """What it has that these flags have not; which prompts are held out is no matter of training."""
        given = _settings(env)
        return {name: value for name, value in self.env.items() if value != given[name] and name not in _PROMPTS}


def shown(settings: Mapping[str, Any]) -> str:
    """Settings in a line.

    >>> shown({"temperature": 0.7, "tokenizer": None})
    'temperature 0.7, tokenizer by default'
    """
    told = (f"{name} {'by default' if value is None else value}" for name, value in settings.items())
    return printable(", ".join(told))


def runs_joined(policies: Mapping[str, TrainedWith | None], env: EnvFlags, start: str | None) -> list[list[str]]:
    """The names of the policies of each run, first things first: what the frontier joins.

    Args:
        policies: By name.
        env: What they are evaluated by.
        start: The name of the reference among them; a run that began as it begins there.
    """
    runs: dict[str, list[tuple[int, str]]] = {}
    for name, trained in policies.items():
        if trained is not None:
            begun = trained.from_reference and "reference" not in trained.otherwise(env)
            first = [(-1, start)] if begun and start is not None else []
            runs.setdefault(trained.run, first).append((trained.updates, name))
    return [[name for _, name in sorted(found)] for found in runs.values()]


def _settings(env: EnvFlags) -> dict[str, Any]:
    return {name: _lasting(getattr(env, name)) if name in _PATHS else getattr(env, name) for name in SETTINGS}


def _lasting(name: str | None) -> str | None:
    """A folder or file by its whole path; a hub name, `module:attribute` or None is what it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name
