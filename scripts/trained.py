"""What a policy was trained with: a small file in its folder, by which evaluations, chats and resumed runs go."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

from scripts.options import EnvFlags, is_code, prompt_sources
from textenv.rewards.human import printable

FILE = "textenv.json"
_FORMAT = 2
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
"""Flags of the environment that an evaluation needs."""
_SAVED = tuple(f.name for f in fields(EnvFlags) if f.name not in ("device", "trust_remote_code"))
"""What a run is resumed with. The device is the machine's; whether code is trusted is nothing that a file may say."""


@dataclass(frozen=True)
class TrainedWith:
    """What one policy of one run was trained with."""

    env: Mapping[str, Any]
    """All flags of the environment but the device and trust; folders and files that were there by their whole paths."""
    model: str | None
    """What the run began with, as its flag says."""
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
        apart = not lora and None not in (model, env.reference) and _lasting(model) != _lasting(env.reference)
        reference = env.reference if apart else model or env.reference
        settings = _settings(replace(env, reference=reference))
        return cls(settings, _lasting(model), str(run.resolve()), updates, not apart)

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
            if saved.pop("format") != _FORMAT:
                raise ValueError("another format")
            env = _checked(saved.pop("env"), EnvFlags, _SAVED)
            return cls(env, **_checked(saved, cls, [f.name for f in fields(cls) if f.name != "env"]))
        except (ValueError, LookupError, TypeError, AttributeError, OSError, RecursionError) as error:
            wanted = f"model: expected a {FILE} of format {_FORMAT}"
            raise ValueError(f"{wanted}, got another in {folder} ({printable(str(error))})") from error

    def flags(self) -> EnvFlags:
        """Those of a command that goes on or asks as training did; without a reward that is code, see `with_code`."""
        reward = None if self._code() else self.env["reward"]
        return replace(EnvFlags(), **{**self.env, "reward": reward})

    def with_code(self, env: EnvFlags) -> EnvFlags:
        """Flags that began as `flags`, with the reward that is code if they name none and trust it.

        Raises:
            ValueError: If they name none and do not.
        """
        if not self._code() or env.reward is not None:
            return env
        if not env.trust_remote_code:
            raise ValueError(
                f"env.reward: expected --env.reward {self.env['reward']} or another, because the model was trained "
                "with that code, and a folder alone may not have code run (--env.trust-remote-code lets it), got none"
            )
        return replace(env, reward=self.env["reward"])

    def kept(self, env: EnvFlags) -> dict[str, Any]:
        """What an evaluation by these flags has of it that is no default."""
        default, given = _settings(EnvFlags()), _settings(env)
        return {name: self.env[name] for name in SETTINGS if self.env[name] == given[name] != default[name]}

    def otherwise(self, env: EnvFlags) -> dict[str, Any]:
        """What it has that an evaluation by these flags has not; held-out prompts are no matter of training."""
        given, names = _settings(env), [name for name in SETTINGS if name not in _PROMPTS]
        return {name: self.env[name] for name in names if self.env[name] != given[name]}

    def changed(self, now: TrainedWith) -> dict[str, Any]:
        """What it has that a run which goes on from it has not."""
        settings, others = ({"model": one.model, **one.env} for one in (self, now))
        return {name: value for name, value in settings.items() if value != others[name]}

    def _code(self) -> bool:
        return self.env["reward"] is not None and is_code(self.env["reward"])


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


def _checked(values: Any, owner: type, names: Collection[str]) -> dict[str, Any]:
    """What a file says, a list as a tuple, if it is all of these fields and each is of its type."""
    if values.keys() != set(names):
        raise ValueError(f"expected {', '.join(sorted(names))}, got {', '.join(sorted(values))}")
    hints = get_type_hints(owner)
    for name in names:
        if not _fits(values[name], hints[name]):
            raise ValueError(f"{name}: expected {owner.__annotations__[name]}, got {values[name]!r}")
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value of JSON is of a type: a list is a tuple, an integer is a float, and true is no number.

    >>> _fits([1, 7], tuple[int, ...] | None), _fits("17", tuple[int, ...] | None), _fits(1, float), _fits(True, int)
    (True, False, True, False)
    """
    parts = get_args(hint)
    if get_origin(hint) is Literal:
        return value in parts
    if get_origin(hint) is tuple:
        return isinstance(value, list) and all(_fits(one, parts[0]) for one in value)
    if parts:
        return any(_fits(value, part) for part in parts)
    return type(value) is hint or (hint is float and type(value) is int)


def _settings(env: EnvFlags) -> dict[str, Any]:
    settings = {name: getattr(env, name) for name in _SAVED}
    prompts = None if env.prompts is None else prompt_sources(env.prompts).sources
    weighted = None if prompts is None else tuple(f"{_lasting(name)}={weight!r}" for name, weight in prompts)
    return settings | {name: _lasting(settings[name]) for name in _PATHS} | {"prompts": weighted}


def _lasting(name: str | None) -> str | None:
    """A folder or file by its whole path; a hub name, `module:attribute` or None is what it is."""
    return str(Path(name).resolve()) if name is not None and Path(name).exists() else name
