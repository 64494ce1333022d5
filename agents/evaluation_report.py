"""A comparison of policies for people to read: JSON, Markdown and one HTML page that needs no other file.

What models wrote is other people's text: it is escaped wherever it is written, and what cannot be seen is shown.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.evaluation_lines import (
    SUBORDINATE,
    caution,
    counted,
    headlines,
    number_rows,
    sample_rows,
    verdicts,
)
from agents.evaluation_metrics import Result
from agents.frontier import Lines, frontier_figure, points
from agents.learning_curve import DARK, LIGHT, png
from agents.report import flat, markdown, render
from agents.tracking import number
from textenv.rewards.human import printable

if TYPE_CHECKING:
    from rich.console import Console


def write_evaluation(
    folder: str | Path,
    results: Sequence[Result],
    config: Mapping[str, Any],
    *,
    second_name: str = "Second reward",
    title: str = "Evaluation",
    lines: Lines = (),
) -> None:
    """Write `evaluation.json`, `evaluation.md`, `frontier.png` and `report.html`.

    Args:
        folder: Where to; made if absent.
        results: As `agents.evaluation_metrics.compare` gives them, the baseline first.
        config: Settings; nested mappings become dotted names.
        second_name: What the second reward is called.
        title: Heading of the pages.
        lines: Names of policies that the frontier joins: of each run, in its order.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    found = points(results)
    pictures = [png(frontier_figure(found, second_name, colours, lines)) for colours in (LIGHT, DARK)]
    (folder / "frontier.png").write_bytes(pictures[0])
    everything = {
        "baseline": results[0].name,
        "second_reward": second_name if "second" in results[0].metrics else None,
        "settings": flat(config),
        "results": {result.name: result.as_dict() for result in results},
    }
    text = json.dumps(everything, indent=1, allow_nan=False, ensure_ascii=False)
    (folder / "evaluation.json").write_text(text + "\n", encoding="utf8")
    (folder / "evaluation.md").write_text(evaluation_markdown(results, second_name, title), encoding="utf8")
    page = evaluation_html(results, config, *pictures, second_name=second_name, title=title)
    (folder / "report.html").write_text(page, encoding="utf8")


def evaluation_markdown(results: Sequence[Result], second_name: str, title: str, limit: int = 60) -> str:
    """Verdicts, numbers and the first responses, as a Markdown page."""
    first = results[0].assessment
    out = [f"# {markdown(title)}", "", f"{counted(first)} {caution(results)}".strip(), ""]
    out += [f"- {markdown(told)}" for told, _ in verdicts(results, second_name)]
    names = [markdown(printable(result.name)) for result in results]
    out += ["", f"| | {' | '.join(names)} | |", "|:--|" + "--:|" * len(names) + ":--|"]
    for line, cells in number_rows(results, second_name):
        label = f"· {markdown(line.name)}" if line.key in SUBORDINATE else f"**{markdown(line.name)}**"
        out.append(f"| {label} | {' | '.join(cells)} | {line.meaning} |")
    rows = sample_rows(results, limit)
    out += ["", f"The first {rows[-1]['number']} of {len(first.prompts)} prompts, not chosen.", ""]
    out += ["| # | | prompt | response | score | KL |", "|--:|:--|:--|:--|--:|--:|"]
    for row in rows:
        texts = " | ".join(markdown(row[key]) for key in ("name", "prompt", "response"))
        out.append(f"| {row['number']} | {texts} | {number(row['score'])} | {number(row['kl'])} |")
    return "\n".join(out) + "\n"


def evaluation_html(
    results: Sequence[Result], config: Mapping[str, Any], light: bytes, dark: bytes, *, second_name: str, title: str
) -> str:
    """One page that needs no other file: styles, script and pictures are inside, model output is escaped.

    Args:
        results: The baseline first.
        config: Settings.
        light: The frontier as PNG, for light screens.
        dark: The same for dark screens.
        second_name: What the second reward is called.
        title: Heading of the page.
    """
    rows = sample_rows(results)
    values = {
        "title": title,
        "counted": counted(results[0].assessment),
        "caution": caution(results),
        "headlines": headlines(results, second_name),
        "verdicts": verdicts(results, second_name),
        "names": [printable(result.name) for result in results],
        "numbers": number_rows(results, second_name),
        "subordinate": SUBORDINATE,
        "second_name": second_name,
        "has_second": rows[0]["second"] is not None,
        "drawn_second": "second" in results[0].metrics,
        "rows": rows,
        "shown": rows[-1]["number"],
        "prompts": len(results[0].assessment.prompts),
        "settings": flat(config),
        "light": base64.b64encode(light).decode(),
        "dark": base64.b64encode(dark).decode(),
    }
    return render("evaluation_template.html", values)


def print_evaluation(console: Console, results: Sequence[Result], *, second_name: str, limit: int) -> None:
    """Print the verdicts, the numbers, and the responses to the first `limit` prompts."""
    from rich import box
    from rich.table import Table
    from rich.text import Text

    numbers = Table(box=box.SIMPLE_HEAD, header_style="dim", pad_edge=False)
    numbers.add_column("")
    for result in results:
        numbers.add_column(Text(printable(result.name)), justify="right")
    for line, cells in number_rows(results, second_name):
        more = line.key in SUBORDINATE
        numbers.add_row(Text(f"  {line.name}" if more else line.name, "dim" if more else "bold"), *cells)
    console.print(numbers)
    for told, _ in verdicts(results, second_name):
        console.print(Text(told))
    if caution(results):
        console.print(Text(caution(results), "yellow"))
    if not limit:
        return
    texts = Table(box=box.HORIZONTALS, header_style="dim", show_lines=True, pad_edge=False, expand=True)
    texts.add_column("", max_width=16, overflow="fold")
    texts.add_column("score", justify="right", no_wrap=True)
    texts.add_column("response", ratio=1, overflow="fold")
    each = results[0].assessment.per_prompt
    for row in sample_rows(results, limit * each * len(results)):
        text = Text.assemble((row["prompt"], "italic dim"), row["response"])
        texts.add_row(Text(row["name"]), number(row["score"]), text)
    console.print(texts)
