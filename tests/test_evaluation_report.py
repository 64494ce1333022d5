"""The evaluation's pages: every number is there, what models wrote is escaped and shown, no other file is needed."""

from __future__ import annotations

import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from agents import evaluation_lines, evaluation_report
from agents.evaluation_metrics import Result, compare, distinct, second_score
from agents.frontier import points
from agents.tracking import number
from tests.evaluation_fixtures import TEXTS, assessment

NASTY = "<script>alert('x')</script> & \"quoted\" | **bold** [red]markup[/red] {{ 7 * 7 }}\nnext \x1b[2J\u202eline"
SHOWN = NASTY.replace("\x1b", r"\x1b").replace("\u202e", r"\u202e")
CONFIG = {"seed": 3, "env": {"reward": "<b>plain</b>"}}
VOID = {"meta", "img", "input", "source", "br"}


HACKED = [0.0, 0.5, 0.25, 0.0]


def results(second: list[float] | bool = True, texts: list[str] = TEXTS, name: str = "model") -> list[Result]:
    seconds = ([1.0, 1.0, 1.0, 1.0], HACKED if second is True else second) if second else (None, None)
    return compare(
        [
            assessment("reference", [0.0, 1.0, 0.0, 1.0], seconds[0]),
            assessment(name, [5.0, 6.0, 5.0, 6.0], seconds[1], texts),
            assessment("other", second=seconds[0]),
        ],
        second_score if second else None,
    )


class Page(HTMLParser):
    """Tags, addresses, and the cells and texts of the tables of a page."""

    def __init__(self, source: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.open: list[str] = []
        self.addresses: list[str] = []
        self.records: list[dict[str, str | None]] = []
        self.texts: list[str] = []
        self.depth = 0
        self.feed(source)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        self.tags.append(tag)
        self.addresses += [value or "" for name, value in attrs if name in ("src", "srcset", "href", "action")]
        if tag not in VOID:
            self.open.append(tag)
        if "data-score" in given:
            self.records.append(given)
        if "text" in (given.get("class") or "").split():
            self.texts.append("")
            self.depth = len(self.open)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag
        if len(self.open) < self.depth:
            self.depth = 0

    def handle_data(self, data: str) -> None:
        if self.depth:
            self.texts[-1] += data


def html(found: list[Result], **changes: Any) -> str:
    options = {"second_name": "Calm", "title": "A <page>", **changes}
    return evaluation_report.evaluation_html(found, CONFIG, b"light", b"dark", **options)


def test_four_files_are_written(tmp_path: Path) -> None:
    evaluation_report.write_evaluation(tmp_path / "run", results(), CONFIG, second_name="Calm")
    names = sorted(path.name for path in (tmp_path / "run").iterdir())
    assert names == ["evaluation.json", "evaluation.md", "frontier.png", "report.html"]
    assert (tmp_path / "run" / "frontier.png").read_bytes().startswith(b"\x89PNG")
    written = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    assert (written["baseline"], written["second_reward"]) == ("reference", "Calm")
    assert list(written["results"]) == ["reference", "model", "other"]
    model = written["results"]["model"]
    assert model["metrics"]["score"]["value"] == 5.5 and model["gains"]["score_gain"]["value"] == 5.0
    assert model["over_optimised"] is True and model["responses"] == TEXTS


def test_json_has_no_nan(tmp_path: Path) -> None:
    one = compare([assessment(name, [1.0, 2.0], responses=["a", "b"], prompts=["p"]) for name in "ab"])
    evaluation_report.write_evaluation(tmp_path, one, {})
    written = json.loads((tmp_path / "evaluation.json").read_text(), parse_constant=pytest.fail)
    assert written["results"]["a"]["metrics"]["score"] == {"value": 1.5, "se": None, "low": None, "high": None}
    assert written["second_reward"] is None


def test_every_number_is_on_the_page_with_its_interval() -> None:
    found, source = results(), html(results())
    wins = found[1].gains["score_wins"]
    assert f"{100 * wins.value:.0f} % ({100 * wins.low:.0f}–{100 * wins.high:.0f})" in source
    for key in ("score", "second", "kl_token", "perplexity", "distinct_3"):
        estimate = found[1].metrics[key]
        digits = 2 if key == "perplexity" else 3
        assert f"<td>{number(estimate.value, digits)} ± {number(estimate.high - estimate.value, digits)}</td>" in source
    printed = {line.key for line, _ in evaluation_lines.number_rows(found, "Calm")}
    assert printed == {*found[1].metrics, *found[1].gains}


def test_verdicts() -> None:
    source = html(results())
    assert re.findall(r'<li data-flag="(\w+)">', source) == ["up", "down"]
    assert "model is over-optimised: score +5.000 ± 0.000, Calm −0.812 ± 0.122 against the baseline." in source
    undecided = html(results(second=[0.5, 1.5, 1.0, 0.5]))
    assert re.findall(r'<li data-flag="(\w+)">', undecided) == ["none", "down"]
    assert "model: over-optimisation is neither shown nor ruled out: score +5.000 ± 0.000, Calm −0.125 ±" in undecided
    assert "other is not over-optimised: score" in undecided  # its second rewards are the baseline's own
    unknown = html(results(second=False))
    assert re.findall(r'<li data-flag="(\w+)">', unknown) == ["none"] and unknown.count("was not looked for") == 1
    assert "Calm" not in unknown.replace("Calm against", "")


def test_few_prompts_are_told(tmp_path: Path) -> None:
    told = "2 prompts are few: below 30 the intervals are too narrow."
    out = io.StringIO()
    evaluation_report.print_evaluation(Console(file=out, width=200), results(), second_name="Calm", limit=0)
    markdown = evaluation_report.evaluation_markdown(results(), "Calm", "Evaluation")
    assert all(told in text for text in (html(results()), markdown, out.getvalue()))
    columns = ("lengths", "finish_reasons", "kls", "exact_kls", "entropies", "ref_nlls", "scores")
    numbers = {name: [1] * 30 for name in columns}
    prompts = [str(i) for i in range(30)]
    enough, fewer = (
        compare([assessment(responses=["a"] * n, prompts=prompts[:n], **{k: v[:n] for k, v in numbers.items()})])
        for n in (30, 29)
    )
    assert evaluation_lines.caution(enough) == "" and evaluation_lines.caution(fewer).startswith("29 prompts are few")


def test_the_page_is_one_file() -> None:
    parsed = Page(html(results()))
    assert parsed.open == []
    assert parsed.addresses and all(address.startswith("data:image/png;base64,") for address in parsed.addresses)
    assert "link" not in parsed.tags and parsed.tags.count("script") == 1
    assert not re.search(r"url\(|@import|https?:", html(results()))


def test_what_others_wrote_is_escaped_and_shown() -> None:
    clean = Page(html(results()))
    source = html(results(texts=[NASTY, *TEXTS[1:]], name="<i>"))
    parsed = Page(source)
    assert parsed.tags == clean.tags and len(parsed.tags) > 100
    assert f"Once{SHOWN} ∎" in parsed.texts
    assert "<title>A &lt;page&gt;</title>" in source and "&lt;b&gt;plain&lt;/b&gt;" in source
    assert "{{ 7 * 7 }}" in source and "\x1b" not in source and "\u202e" not in source


def test_texts_and_names_are_shown_as_they_are_but_for_what_acts_unseen() -> None:
    hidden = "".join(map(chr, (0x00, 0x07, 0x0D, 0x1B, 0x7F, 0x85, 0x061C, 0x200E, 0x202E, 0x2066, 0xE0001)))
    text = "naïve “words” — 日本 🙂\nnew line"
    [row, *_] = evaluation_lines.sample_rows(compare([assessment(text + hidden, prompts=[text + hidden, "b"])]))
    for key in ("name", "prompt"):
        assert row[key].startswith(text)
        assert not set(row[key]) & set(hidden)
        assert row[key].endswith(r"\x85\u061c\u200e\u202e\u2066\U000e0001")


def test_rows_carry_what_sorting_needs() -> None:
    source = html(results())
    records = Page(source).records
    assert len(records) == 12
    assert [record["data-policy"] for record in records] == ["0", "0", "1", "1", "2", "2"] * 2
    assert [float(record["data-score"] or "nan") for record in records[:4]] == [0, 1, 5, 6]
    assert [record["data-place"] for record in records] == [str(i) for i in range(12)]
    keys = set(re.findall(r'data-key="(\w+)"', source))
    assert keys == {"place", "policy", "score", "second", "kl", "length"}
    assert all(f"data-{key}" in record for key in keys for record in records)
    assert "second" not in set(re.findall(r'data-key="(\w+)"', html(results(second=False))))
    assert source.count("∎") == 3  # one response of each policy stopped


def test_whole_prompts_up_to_the_limit() -> None:
    rows = evaluation_lines.sample_rows(results(), limit=7)
    assert [row["number"] for row in rows] == [1] * 6
    assert "The first 1 of 2 prompts" in evaluation_report.evaluation_markdown(results(), "Calm", "E", limit=7)


def test_markdown_keeps_its_rows() -> None:
    found = results(texts=[NASTY, *TEXTS[1:]])
    text = evaluation_report.evaluation_markdown(found, "Calm", "Evaluation")
    lines = [line for line in text.splitlines() if line.startswith("|")]
    counts = [len(re.findall(r"(?<!\\)\|", line)) for line in lines]
    numbers = len(evaluation_lines.number_rows(found, "Calm")) + 2
    assert counts == [6] * numbers + [7] * 14
    assert "<script" not in text and "\\*\\*bold\\*\\*" in text
    assert "- model is over-optimised" in text and "2 held-out prompts, 2 responses to each." in text


def test_the_terminal_shows_text_as_text() -> None:
    out = io.StringIO()
    found = results(texts=[NASTY, *TEXTS[1:]])
    evaluation_report.print_evaluation(Console(file=out, width=200), found, second_name="Calm", limit=1)
    printed = out.getvalue()
    assert "[red]markup[/red]" in printed and "\x1b" not in printed and "model is over-optimised" in printed
    assert "Once" in printed and "The cat" not in printed


def test_headlines_compare_the_first_policy_with_the_baseline() -> None:
    lines = evaluation_lines.headlines(results(texts=["a b a b"] * 4), "Calm")
    assert [(line.name, line.before, line.after) for line in lines] == [
        ("Score", "0.50", "5.50"),
        ("Calm", "1.00", "0.19"),
        ("KL per response", "1.75", "1.75"),
        ("Distinct-2", "0.60", "0.17"),
    ]
    assert [line.change for line in lines][::3] == ["+5.000 ± 0.000", "28 % of the baseline's"]


def test_distinct_as_second_reward_is_no_headline_twice() -> None:
    found = compare([assessment("a"), assessment("b")], lambda one: distinct(one, 2))
    assert [line.name for line in evaluation_lines.headlines(found, "D2")] == ["Score", "D2", "KL per response"]


def test_points_are_sorted_by_kl() -> None:
    far = compare([assessment("b", exact_kls=[9.0] * 4), assessment("a")])
    assert [point.name for point in points(far)] == ["a", "b"]
