"""The report says what happened, escapes what the model wrote, and needs no other file."""

from __future__ import annotations

import io
import math
import re
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

import pytest
from rich.console import Console

from agents import learning_curve, report, tracking

NASTY = "<script>alert('x')</script> & \"quoted\" | **bold** [red]markup[/red] {{ 7 * 7 }}\nnext \x1b[2J\u061cline"
CONFIG = {"seed": 3, "ppo": {"lr": 3e-4, "name": "<b>plain</b>"}}


@dataclass
class FakeEvaluation:
    """What the report reads of an evaluation."""

    prompts: list[str]
    responses: list[str]
    scores: list[float]
    kls: list[float]
    lengths: list[int]
    finish_reasons: list[int]
    summary: dict[str, float]


def evaluation(score: float, kl: float, sd: float = 2.0, distinct: float = 0.5, count: int = 3) -> FakeEvaluation:
    summary = {"score_mean": score, "score_sd": sd, "kl_mean": kl, "distinct_2": distinct, "length_mean": 24.0}
    prompts = [f"Once, {i}" for i in range(count)]
    responses = [f"response {i} at {score}" for i in range(count)]
    scores = [score + i for i in range(count)]
    return FakeEvaluation(prompts, responses, scores, [kl] * count, [24] * count, [1] * count, summary)


def rows(count: int = 30) -> list[dict[str, float]]:
    return [{"iteration": i, "score/mean": 1 + i / 10, "kl/sequence": i / 5} for i in range(count)]


class Page(HTMLParser):
    """Tags, addresses and sample texts of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.addresses: list[str] = []
        self.records: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.inside = False
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")]
        if "data-gain" in given:
            self.records.append(given)
        self.inside = "text" in (given.get("class") or "").split()
        if self.inside:
            self.texts.append("")

    def handle_endtag(self, tag: str) -> None:
        self.inside = False

    def handle_data(self, data: str) -> None:
        if self.inside:
            self.texts[-1] += data


def page(before: FakeEvaluation, after: FakeEvaluation) -> str:
    return report.report_html(before, after, CONFIG, b"light", b"dark", iterations=30, title="A <run>")


def test_write_report_writes_three_files(tmp_path: Path) -> None:
    report.write_report(tmp_path / "run", rows(), evaluation(1, 0), evaluation(4, 6.5), CONFIG)
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [
        "learning_curve.png", "report.html", "samples.md",
    ]  # fmt: skip
    assert (tmp_path / "run" / "learning_curve.png").read_bytes().startswith(b"\x89PNG")


def test_headlines_hold_the_numbers() -> None:
    lines = report.headlines(evaluation(1, 0), evaluation(4, 6.5, distinct=0.4))
    assert [(line.name, line.before, line.after, line.change) for line in lines] == [
        ("Score", "1.00", "4.00", "+3.00, or 1.5 sd"),
        ("KL", "0.00", "6.50", "nats per response"),
        ("Distinct-2", "0.500", "0.400", "80 % kept"),
        ("Length", "24.0", "24.0", "tokens per response"),
    ]


def test_headlines_without_spread() -> None:
    score, _, variety, _ = report.headlines(evaluation(1, 0, sd=0.0, distinct=0.0), evaluation(0, 1))
    assert (score.change, variety.change) == ("−1.00", "")


def test_samples_refuse_other_prompts() -> None:
    other = evaluation(1, 0)
    other.prompts = other.prompts[::-1]
    with pytest.raises(ValueError, match=r"^after: expected the 3 prompts of `before` in their order, got 3 prompts"):
        report.samples(evaluation(1, 0), other)


def test_html_is_one_file() -> None:
    parsed = Page(page(evaluation(1, 0), evaluation(4, 6.5)))
    assert parsed.addresses and all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "link" not in parsed.tags and parsed.tags.count("script") == 1
    assert not re.search(r"url\(|@import|https?:", page(evaluation(1, 0), evaluation(4, 6.5)))


def test_html_escapes_what_others_wrote() -> None:
    before, after = evaluation(1, 0), evaluation(4, 6.5)
    clean = Page(page(before, after))
    before.responses[0] = after.responses[1] = NASTY
    before.prompts[2] = after.prompts[2] = NASTY
    source = page(before, after)
    parsed = Page(source)
    # The same tags as a tame page, the very characters as text, and nothing evaluated.
    assert parsed.tags == clean.tags and len(parsed.tags) > 40
    assert parsed.texts.count(NASTY.replace("\x1b", r"\x1b").replace("\u061c", r"\u061c")) == 3
    assert "<title>A &lt;run&gt;</title>" in source and "&lt;b&gt;plain&lt;/b&gt;" in source


def test_html_carries_what_sorting_needs() -> None:
    records = Page(page(evaluation(1, 0), evaluation(4, 6.5))).records
    assert [record["data-number"] for record in records] == ["1", "2", "3"]
    assert [float(record["data-gain"] or "nan") for record in records] == [3, 3, 3]
    assert [float(record["data-after"] or "nan") for record in records] == [4, 5, 6]
    keys = set(re.findall(r'data-key="(\w+)"', page(evaluation(1, 0), evaluation(4, 6.5))))
    assert all(f"data-{key}" in record for key in keys for record in records) and len(keys) == 5


def test_markdown_keeps_one_row_per_prompt() -> None:
    before, after = evaluation(1, 0), evaluation(4, 6.5)
    after.responses[1] = NASTY
    lines = report.samples_markdown(before, after, limit=2).splitlines()
    table = lines[lines.index(next(line for line in lines if line.startswith("| # "))) :]
    assert len(table) == 4  # head, rule, two prompts
    assert all(len(re.findall(r"(?<!\\)\|", line)) == 8 for line in table)
    assert "\\*\\*bold\\*\\*" in table[3] and "<script" not in table[3] and "<br>next" in table[3]
    assert "The first 2 of 3 held-out prompts" in "\n".join(lines)


def test_terminal_table_shows_text_as_text() -> None:
    before, after = evaluation(1, 0), evaluation(4, 6.5)
    before.responses[0] = NASTY
    out = io.StringIO()
    report.print_comparison(Console(file=out, width=200), before, after, limit=2)
    printed = out.getvalue()
    assert "[red]markup[/red]" in printed and "\x1b" not in printed
    assert "+3.00, or 1.5 sd" in printed and "response 1 at 4" in printed and "response 2 at 4" not in printed


def test_smoothed_does_not_shift_a_line() -> None:
    line = [float(i) for i in range(20)]
    assert learning_curve.smoothed(line, 6)[:17] == pytest.approx(line[:17])
    assert learning_curve.smoothed(line, 1) == line


def test_series_leaves_gaps_out() -> None:
    data = [{"iteration": 0, "a": 1.0}, {"iteration": 1}, {"iteration": 2, "a": math.nan}, {"iteration": 3, "a": 2.0}]
    assert learning_curve.series(data, "a") == ([0, 3], [1.0, 2.0])


def test_learning_curve_draws_the_rows_and_the_band() -> None:
    data = rows(10)
    data[4] |= {"eval/score_mean": 1.3, "eval/kl_mean": 0.9}
    figure = learning_curve.learning_curve(data, evaluation(1, 0))
    score, kl = figure.axes
    curves = [list(line.get_ydata()) for line in score.lines]
    assert [row["score/mean"] for row in data] in curves and [1.3] in curves
    assert [row["kl/sequence"] for row in data] in [list(line.get_ydata()) for line in kl.lines]
    assert score.patches[0].get_extents().transformed(score.transData.inverted()).intervaly == pytest.approx([-1, 3])
    assert kl.get_ylim()[0] == 0
    assert {"Score", "1.90", "before\n1.00 ± 2.00"} <= {text.get_text() for text in score.texts}


def test_scores_in_units_that_move_are_not_drawn_beside_those_that_do_not() -> None:
    data = rows(10)
    assert learning_curve.png(learning_curve.learning_curve(data, evaluation(1, 0), fixed_units=False))
    for place, value in ((4, 1.3), (9, 1.6)):
        data[place] |= {"eval/score_mean": value, "eval/kl_mean": 0.9}
    score, kl = learning_curve.learning_curve(data, evaluation(1, 0), fixed_units=False).axes
    drawn = {value for line in score.lines for value in line.get_ydata()}
    assert drawn == {1, 1.3, 1.6}  # the band's mean and the held-out scores; those of rollouts are 1.0, 1.1, ..., 1.9
    assert "1.60" in {text.get_text() for text in score.texts}
    assert score.get_xlim() == kl.get_xlim() == (0, 9)


@pytest.mark.parametrize("count", [0, 1, 2])
def test_learning_curve_of_a_short_run(count: int) -> None:
    figure = learning_curve.learning_curve(rows(count), evaluation(1, 0), learning_curve.DARK)
    assert learning_curve.png(figure).startswith(b"\x89PNG")


@pytest.mark.parametrize("last", [0.01, -0.05, 0.3, 3.0])
def test_a_label_gives_way(last: float) -> None:
    data = [{"iteration": i, "score/mean": last * i, "kl/sequence": 0.0} for i in range(2)]
    figure = learning_curve.learning_curve(data, evaluation(0, 0, sd=1.0))
    boxes = {text.get_text().split("\n")[0]: text.get_window_extent() for text in figure.axes[0].texts}
    ours, theirs = boxes[tracking.number(last)], boxes["before"]
    assert ours.y0 > theirs.y1 or ours.y1 < theirs.y0
