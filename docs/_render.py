"""Write the parts of the documentation that are the code's own words.

    python docs/_render.py

`docs/environment.md` is made of docstrings as a whole, and so are the table between the two `settings` marks of
`docs/ppo.md` and that between the `recipes` marks of `docs/algorithms.md`. What stands between the `frontier` marks of
`docs/reward_hacking.md` is made of the rows of its benchmark. The tests fail while any of them differs from what this
file would write.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import re
import textwrap
from collections.abc import Iterable
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from typing import Any

from agents.algorithms import RECIPES, Algorithm
from agents.config import PPOConfig
from scripts.frontier_page import hacking_block, read_rows
from textenv.env import TextEnv
from textenv.kl import AdaptiveKL, FixedKL, KLController
from textenv.options import EnvOptions
from textenv.replay import replay
from textenv.rewards.base import RewardFunction
from textenv.types import FinishReason, ReplayRecord
from textenv.vector_env import TextVectorEnv

DOCS = Path(__file__).resolve().parent
NOTICE = "<!-- Made by docs/_render.py from docstrings; edit those. -->"
SETTINGS = ("<!-- settings: made by docs/_render.py from PPOConfig -->", "<!-- end of settings -->")
FRONTIER = (
    "<!-- frontier: made by docs/_render.py from docs/benchmarks/frontier.jsonl -->",
    "<!-- end of frontier -->",
)
RECIPE_MARKS = ("<!-- recipes: made by docs/_render.py from agents.algorithms.RECIPES -->", "<!-- end of recipes -->")


def environment_page() -> str:
    """`docs/environment.md`."""
    title, sections = split_sections(documentation(TextEnv))
    history = sections.pop("Version History")
    parts = ["# RLHF-Text-v0", NOTICE, SUMMARY, title]
    parts += [f"## {name}\n\n{text}" for name, text in sections.items()]
    parts += [field_table(EnvOptions, "argument"), option_pairs()]
    parts += ["## Prompts", PROMPTS]
    parts += ["## Finish Reasons", FINISH, name_table("reason", "value", finish_rows())]
    parts += ["## Reward Functions", documentation(RewardFunction), REWARDS]
    parts += ["## KL Coefficient", coefficient()]
    parts += ["## Vector Environment", vector_section()]
    parts += ["## Replay", replay_section()]
    parts += [f"## Version History\n\n{history}"]
    return "\n\n".join(part.strip() for part in parts) + "\n"


SUMMARY = """
| | |
|---|---|
| Action space | `Discrete(V)`, one token id |
| Observation space | `Dict(input_ids, attention_mask, prompt_length)` |
| One | `gym.make("RLHF-Text-v0")` |
| Many | `gym.make_vec("RLHF-Text-v0", num_envs=N)` |
| Whole responses | `env.unwrapped.replay(prompts, responses)` |

`import textenv` registers the id.
"""

FINISH = "`finish_reason` in infos and records is a `textenv.FinishReason`."

PROMPTS = """
A row of a file that is no prompt is an error with file and line, or, with `prompt_strict=False`, skipped with a
warning.

Text is encoded with the special tokens that the tokenizer adds by itself. A chat, a list of messages with `role` and
`content`, is encoded by the tokenizer's chat template up to where the answer begins; with `chat_template=True` so is
text, as what the user says. Id lists are taken as they are.

`prompts={"stories.txt": 3, "questions.jsonl": 1}` is a mixture: three of four episodes begin with a prompt of the first
file. Sources without a name stand in a `textenv.PromptMixture([(source, weight), ...])`. `reset` draws a source by
chance, and a prompt of it. An agent draws from `task.prompt_stream(seed=...)`, a `textenv.MixedPromptStream`: the
shares are exact over each cycle (here of four draws), each source is gone through in epochs without repetition, in an
order of the seed, and checkpoints save the position. `prompt_index` counts through the sources put together.
"""

REWARDS = """
A folder or hub name is a sequence classifier with one label, which may have a tokenizer of its own because it is given
text, or a token classifier with one label and the policy's vocabulary. A callable that raises, or returns the wrong
number of scores, NaN or infinity, is a `ValueError` that shows the prompt and the response; the step or replay that
asked has then not happened. [Rewards](rewards.md) are the ones that come with the package, what they are combined with,
and their running statistics.
"""


def settings_block() -> str:
    """What stands in `docs/ppo.md` from one `settings` mark to the other."""
    return f"{SETTINGS[0]}\n\n{field_table(PPOConfig, 'setting')}\n\n{SETTINGS[1]}"


def ppo_page(text: str) -> str:
    """`docs/ppo.md` with its table of settings made anew."""
    return between(SETTINGS, settings_block(), text)


def algorithms_page(text: str) -> str:
    """`docs/algorithms.md` with its table of recipes made anew."""
    heading = [
        "name",
        "estimator",
        "objective",
        "aggregation",
        "critic",
        "group",
        "episodes · epochs · minibatches",
        "rate",
    ]
    rows = [recipe_row(name, make()) for name, make in RECIPES.items()]
    return between(RECIPE_MARKS, f"{RECIPE_MARKS[0]}\n\n{table(heading, rows)}\n\n{RECIPE_MARKS[1]}", text)


def reward_hacking_page(text: str) -> str:
    """`docs/reward_hacking.md` with what was measured made anew."""
    block = hacking_block(read_rows(DOCS / "benchmarks" / "frontier.jsonl"))
    return between(FRONTIER, f"{FRONTIER[0]}\n\n{block}\n\n{FRONTIER[1]}", text)


def recipe_row(name: str, algorithm: Algorithm) -> list[str]:
    """What a recipe is made of."""
    loop = algorithm.defaults
    parts = (algorithm.estimator, algorithm.objective, algorithm.aggregation)
    return [
        f"`{name}`",
        *(f"`{short(part)}`" for part in parts),
        "yes" if algorithm.critic is not None else "no",
        str(algorithm.group_size),
        f"{loop.batch_episodes} · {loop.epochs} · {loop.minibatches}",
        f"{loop.learning_rate:g}",
    ]


def short(part: Any) -> str:
    """A component as one would write it: without the settings that are its defaults."""
    settings = []
    for field in fields(part):
        value = getattr(part, field.name)
        if value != field.default:
            shown = short(value) if is_dataclass(value) else f"{value!r}"
            settings.append(shown if field.default is MISSING else f"{field.name}={shown}")
    return f"{type(part).__name__}({', '.join(settings)})"


def between(marks: tuple[str, str], block: str, text: str) -> str:
    """A page with what stands from one mark to the other made anew."""
    start, end = (re.escape(mark) for mark in marks)
    return re.sub(f"{start}.*?{end}", lambda _: block, text, flags=re.DOTALL)


# ---------------------------------------------------------------------------------------------------- option pairs

KL_SOURCES = (None, "agent", "policy", "reference")
CREDITS, ENDS, PENALTIES = ("token", "sequence"), ("terminate", "truncate"), (0.0, 1.0)
COEFFICIENTS: tuple[Any, ...] = (0.0, 0.1, AdaptiveKL())


def legal(**options: Any) -> bool:
    """Whether `EnvOptions` takes these together."""
    try:
        EnvOptions(**options)
    except ValueError:
        return False
    return True


def a_policy(*_: Any) -> Any:
    """Stand in for a live policy; it is never asked."""


def option_pairs() -> str:
    """The two tables of legal pairs, found by trying each."""

    def source(kl_source: str | None, policy: Any) -> str:
        if not legal(kl_source=kl_source, policy=policy):
            return "`ValueError`"
        return f"`{kl_source or ('agent' if policy is None else 'policy')}`"

    who = [
        [f"`{kl_source!r}`" if kl_source else "not given", source(kl_source, None), source(kl_source, a_policy)]
        for kl_source in KL_SOURCES
    ]
    when = [
        [f"`{credit!r}`", f"`{end!r}`"]
        + [
            "legal" if legal(kl_credit=credit, length_end=end, missing_eos_penalty=penalty) else "`ValueError`"
            for penalty in PENALTIES
        ]
        for credit, end in itertools.product(CREDITS, ENDS)
    ]
    return "\n\n".join(
        [
            "### Legal Option Pairs",
            "Who knows log π. A policy given later, with `env.unwrapped.attach(policy)`, makes it `policy` unless "
            "`kl_source` was given as another.",
            table(["`kl_source`", "without `policy`", "with `policy`"], who),
            "What is paid when.",
            table(
                ["`kl_credit`", "`length_end`", "`missing_eos_penalty` = 0", "`missing_eos_penalty` > 0"],
                when,
            ),
            "A combination is legal if both tables allow it, with any `kl_coef`. A `kl_coef` of 0 loads no reference, "
            "and `ref_logprob` and `kl` are then 0; a controller loads it whatever its value. `agents.PPO` raises on "
            "`kl_source='reference'`.",
        ]
    )


# ---------------------------------------------------------------------------------------------------- sections


def coefficient() -> str:
    """The controllers of β."""
    parts = [
        "`kl_coef` is a number, or an object that holds β and may move it once per rollout: `value`, "
        "`update(mean_sequence_kl, episodes)`, `state_dict()` and `load_state_dict(state)` "
        f"(`textenv.kl.{KLController.__name__}`). The agent calls `update`; checkpoints keep the state."
    ]
    for kind in (FixedKL, AdaptiveKL):
        first, *rest = documentation(kind).split("\n\n")
        parts.append(f"`textenv.kl.{kind.__name__}`: {first}")
        parts += [code_block(text) for text in rest]
        parts.append(field_table(kind, "argument"))
    return "\n\n".join(parts)


def vector_section() -> str:
    """What the vector environment adds."""
    args = google_section(documentation(TextVectorEnv.__init__), "Args")
    args.pop("**options")
    rows = [[f"`{name}`", text] for name, text in args.items()]
    return f"{documentation(TextVectorEnv)}\n\nBesides the arguments above:\n\n{table(['argument', 'meaning'], rows)}"


def replay_section() -> str:
    """The third path."""
    text = documentation(replay)
    prose = text.split("\n\nArgs:")[0]
    args = google_section(text, "Args")
    args.pop("task")
    raises = google_section(text, "Raises")["ValueError"]
    rows = [[f"`{name}`", meaning] for name, meaning in args.items()]
    return "\n\n".join(
        [
            "`envs.unwrapped.replay(prompts, responses, logprobs=None, aborted=None)`",
            prose,
            table(["argument", "meaning"], rows),
            f"`ValueError`: {raises}",
            f"It returns a `textenv.ReplayRecord`. {documentation(ReplayRecord)}",
            name_table("field", "what", field_docs(ReplayRecord).items()),
        ]
    )


def finish_rows() -> Iterable[tuple[str, str]]:
    """`FinishReason` members with their docstrings."""
    for name, text in field_docs(FinishReason).items():
        yield name, f"{FinishReason[name].value}: {text}"


# ---------------------------------------------------------------------------------------------------- docstrings


def documentation(thing: Any) -> str:
    """Its docstring, which must exist."""
    text = inspect.getdoc(thing)
    if not text:
        raise ValueError(f"thing: expected something with a docstring, got {thing!r}")
    return text


def split_sections(text: str) -> tuple[str, dict[str, str]]:
    """What precedes the first `##` heading, and each heading's text."""
    head, *rest = re.split(r"^## ", text, flags=re.MULTILINE)
    sections = (part.split("\n", 1) for part in rest)
    return head.strip(), {name.strip(): body.strip() for name, body in sections}


def google_section(text: str, name: str) -> dict[str, str]:
    """A section of a Google docstring: each entry's name and meaning."""
    body = text.split(f"{name}:\n", 1)[1].split("\n\n", 1)[0]
    entries: dict[str, str] = {}
    for line in textwrap.dedent(body).splitlines():
        if line[:1].isspace():
            entries[list(entries)[-1]] += " " + line.strip()
        else:
            entry, meaning = line.split(": ", 1)
            entries[entry] = meaning
    return entries


def field_docs(cls: type) -> dict[str, str]:
    """The string under each field of a class body, on one line."""
    body: Any = ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]
    found: dict[str, str] = {}
    for before, after in itertools.pairwise(body.body):
        is_text = isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant)
        if is_text and isinstance(before, ast.AnnAssign | ast.Assign):
            target: Any = before.target if isinstance(before, ast.AnnAssign) else before.targets[0]
            found[target.id] = " ".join(str(after.value.value).split())
    return found


def field_table(cls: Any, heading: str) -> str:
    """Name, default and meaning of each field of a dataclass."""
    docs: dict[str, str] = {}
    for base in reversed(cls.__mro__):
        docs |= field_docs(base) if is_dataclass(base) else {}
    rows = []
    for field in fields(cls):
        default = "required" if field.default is MISSING else f"`{field.default!r}`"
        rows.append([f"`{field.name}`", default, docs[field.name]])
    return table([heading, "default", "meaning"], rows)


# ---------------------------------------------------------------------------------------------------- Markdown


def name_table(first: str, second: str, rows: Iterable[tuple[str, str]]) -> str:
    """Two columns, the first of them code."""
    return table([first, second], [[f"`{name}`", text] for name, text in rows])


def table(heading: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", r"\|") for cell in line) + " |" for line in lines)


def code_block(text: str) -> str:
    """Indented as Markdown's code."""
    return textwrap.indent(text, "    ")


def main() -> None:
    """Write the pages."""
    (DOCS / "environment.md").write_text(environment_page(), encoding="utf8")
    pages = (("ppo", ppo_page), ("algorithms", algorithms_page), ("reward_hacking", reward_hacking_page))
    for name, made in pages:
        page = DOCS / f"{name}.md"
        page.write_text(made(page.read_text(encoding="utf8")), encoding="utf8")


if __name__ == "__main__":
    main()
