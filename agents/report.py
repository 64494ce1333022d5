"""What a run did, for people to read: samples side by side, a learning curve, one HTML page, a table on the terminal.

Everything here reads plain data: the metric rows of `agents.tracking`, the evaluations on the same held-out prompts
before and after training, and a mapping of settings. Prompts and responses are other people's text: they are escaped
wherever they are written.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.learning_curve import DARK, LIGHT, Rows, learning_curve, png
from agents.tracking import number
from textenv.rewards.human import printable

if TYPE_CHECKING:
    from rich.console import Console

    from agents.evaluation import Evaluation


@dataclass(frozen=True)
class Headline:
    """One number of the evaluation, before and after training."""

    name: str
    """What it is."""
    before: str
    """Printable value of the untrained policy."""
    after: str
    """Printable value of the trained policy."""
    change: str
    """The difference in words that fit the number."""
    meaning: str
    """One line for readers who have not met it."""


@dataclass(frozen=True)
class Sample:
    """The two responses to one held-out prompt."""

    number: int
    """Position among the held-out prompts, from 1."""
    prompt: str
    """The prompt as text."""
    before: str
    """What the untrained policy wrote."""
    after: str
    """What the trained policy wrote."""
    score_before: float
    """Score of the first response."""
    score_after: float
    """Score of the second response."""
    kl_after: float
    """KL to the reference over the second response, in nats."""

    @property
    def gain(self) -> float:
        """How much the score rose."""
        return self.score_after - self.score_before


def write_report(
    folder: str | Path,
    rows: Rows,
    before: Evaluation,
    after: Evaluation,
    config: Mapping[str, Any],
    title: str = "Training report",
    *,
    fixed_units: bool = True,
) -> None:
    """Write `samples.md`, `learning_curve.png` and `report.html`.

    Args:
        folder: Where to; made if absent.
        rows: Metric rows, as `agents.tracking.read_metrics` gives them.
        before: Evaluation of the untrained policy.
        after: Evaluation of the trained policy on the same prompts.
        config: Settings of the run; nested mappings become dotted names.
        title: Heading of the page.
        fixed_units: Whether the scores that were paid are in the units of the evaluations: no statistics moved them.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    pictures = [png(learning_curve(rows, before, colours, fixed_units=fixed_units)) for colours in (LIGHT, DARK)]
    (folder / "learning_curve.png").write_bytes(pictures[0])
    (folder / "samples.md").write_text(samples_markdown(before, after), encoding="utf8")
    page = report_html(before, after, config, *pictures, iterations=len(rows), title=title)
    (folder / "report.html").write_text(page, encoding="utf8")


def headlines(before: Evaluation, after: Evaluation) -> list[Headline]:
    """The numbers that sum up a run, most important first."""
    old, new = before.summary, after.summary
    rise = new["score_mean"] - old["score_mean"]
    in_sd = f", or {number(rise / old['score_sd'], 1)} sd" if old["score_sd"] else ""
    kept = f"{100 * new['distinct_2'] / old['distinct_2']:.0f} % kept" if old["distinct_2"] else ""
    rows = [
        ("Score", "score_mean", 2, sign(rise) + in_sd, "sd of the untrained policy's scores"),
        ("KL", "kl_mean", 2, "nats per response", "distance from the reference model"),
        ("Distinct-2", "distinct_2", 3, kept, "share of word pairs that differ"),
        ("Length", "length_mean", 1, "tokens per response", "mean over the held-out prompts"),
    ]
    return [Headline(name, number(old[k], d), number(new[k], d), change, text) for name, k, d, change, text in rows]


def sign(value: float) -> str:
    """A change, always with its sign.

    >>> sign(1.25), sign(-0.5)
    ('+1.25', '−0.50')
    """
    return ("+" if value >= 0 else "") + number(value)


def samples(before: Evaluation, after: Evaluation) -> list[Sample]:
    """Responses to the same prompts, paired; in the order of the prompts, none left out.

    Raises:
        ValueError: The evaluations do not have the same prompts.
    """
    if list(before.prompts) != list(after.prompts):
        raise ValueError(
            f"after: expected the {len(before.prompts)} prompts of `before` in their order, "
            f"got {len(after.prompts)} prompts that differ"
        )
    columns = (before.prompts, before.responses, after.responses, before.scores, after.scores, after.kls)
    return [
        Sample(i, printable(p), printable(b), printable(a), old, new, kl)
        for i, (p, b, a, old, new, kl) in enumerate(zip(*columns, strict=True), start=1)
    ]


def markdown(text: str) -> str:
    r"""Text as it stands, inside a Markdown table.

    >>> markdown("a | <b>\n*c*")
    'a \\| &lt;b&gt;<br>\\*c\\*'
    """
    escaped = re.sub(r"([\\`*_\[\]|~#!$])", r"\\\1", html.escape(text, quote=False))
    return escaped.strip().replace("\n", "<br>")


def samples_markdown(before: Evaluation, after: Evaluation, limit: int = 40) -> str:
    """The first `limit` prompts with both responses, as a Markdown page."""
    lines = ["# Samples", "", "| | before | after | |", "|:--|--:|--:|:--|"]
    lines += [f"| **{h.name}** | {h.before} | {h.after} | {h.change} |" for h in headlines(before, after)]
    lines += ["", f"The first {min(limit, len(before.prompts))} of {len(before.prompts)} held-out prompts, not chosen."]
    lines += ["", "| # | prompt | before | score | after | score | KL |", "|--:|:--|:--|--:|:--|--:|--:|"]
    for s in samples(before, after)[:limit]:
        texts = [markdown(text) for text in (s.prompt, s.before, s.after)]
        scores = [number(value) for value in (s.score_before, s.score_after, s.kl_after)]
        lines.append(f"| {s.number} | {texts[0]} | {texts[1]} | {scores[0]} | {texts[2]} | {scores[1]} | {scores[2]} |")
    return "\n".join(lines) + "\n"


def report_html(
    before: Evaluation,
    after: Evaluation,
    config: Mapping[str, Any],
    light: bytes,
    dark: bytes,
    iterations: int,
    title: str,
) -> str:
    """One page that needs no other file: styles, script and pictures are inside, model output is escaped.

    Args:
        before: Evaluation of the untrained policy.
        after: Evaluation of the trained policy on the same prompts.
        config: Settings of the run.
        light: The learning curve as PNG, for light screens.
        dark: The same for dark screens.
        iterations: How many iterations were trained.
        title: Heading of the page.
    """
    values = {
        "title": title,
        "iterations": iterations,
        "headlines": headlines(before, after),
        "samples": samples(before, after),
        "settings": flat(config),
        "light": base64.b64encode(light).decode(),
        "dark": base64.b64encode(dark).decode(),
    }
    return render("report_template.html", values)


def render(template: str, values: Mapping[str, Any]) -> str:
    """A page of one of the templates beside this file, every value escaped.

    Args:
        template: Its file name.
        values: All that it names, or jinja2 raises.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"number": number, "sign": sign}
    return environment.get_template(template).render(values)


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """A nested mapping as dotted names and printable values.

    >>> flat({"ppo": {"epochs": 4, "lr": 3e-4}, "seed": 0})
    {'ppo.epochs': '4', 'ppo.lr': '0.0003', 'seed': '0'}
    """
    found: dict[str, str] = {}
    for key, value in config.items():
        if isinstance(value, Mapping) and value:
            found |= flat(value, f"{prefix}{key}.")
        else:
            found[f"{prefix}{key}"] = str(value)
    return found


def print_comparison(console: Console, before: Evaluation, after: Evaluation, limit: int = 4) -> None:
    """Print the headline numbers and the first `limit` samples side by side."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    numbers = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    numbers.add_column("")
    numbers.add_column("before", justify="right")
    numbers.add_column("after", justify="right")
    numbers.add_column("")
    for line in headlines(before, after):
        numbers.add_row(Text(line.name, "bold"), line.before, Text(line.after, "bold cyan"), Text(line.change, "dim"))
    console.print(numbers)
    if not limit:
        return
    pairs = Table(box=box.HORIZONTALS, header_style="dim", show_lines=True, pad_edge=False, expand=True)
    for name, ratio in (("prompt", 2), ("before", 5), ("after", 5)):
        pairs.add_column(name, ratio=ratio, overflow="fold")
    for s in samples(before, after)[:limit]:
        old = Text.assemble((f"{number(s.score_before)}\n", "dim"), s.before.strip())
        new = Text.assemble(
            (number(s.score_after), "bold cyan"), (f"  KL {number(s.kl_after, 1)}\n", "dim"), s.after.strip()
        )
        pairs.add_row(Text(s.prompt.strip(), "italic"), old, new)
    console.print(pairs)
