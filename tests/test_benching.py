"""The cases of the benchmark: counts by hand, fits of known data, what is said, and each case once in a tiny size."""

from __future__ import annotations

import itertools
import json
import math
from dataclasses import asdict
from functools import partial
from pathlib import Path

import pytest
import torch

from scripts.benching import gpu, memory, samplers, scaling, startup
from scripts.benching.models import Shape, llama

SMALL = Shape(vocab=100, hidden=8, layers=2, heads=4, kv_heads=2, intermediate=16)
# Per layer: queries and output 2·8·8, keys and values 2·8·4, the MLP 3·8·16.
SMALL_TRUNK = 2 * (128 + 64 + 384)


def test_the_weights_of_a_shape_are_those_of_its_model() -> None:
    assert SMALL.trunk_weights == SMALL_TRUNK == 1152 and SMALL.weights == 1152 + 800
    matrices = [p.numel() for name, p in llama(SMALL).named_parameters() if p.ndim == 2 and "embed" not in name]
    assert sum(matrices) == SMALL.weights
    assert Shape(100, 8, 2).mlp == 32


@pytest.mark.parametrize(("name", "billions"), [("0.1B", 0.1), ("0.5B", 0.5), ("1.5B", 1.5)])
def test_the_shapes_have_the_sizes_that_they_are_named_for(name: str, billions: float) -> None:
    shape = gpu.SHAPES[name]
    assert shape.trunk_weights / 1e9 == pytest.approx(billions, rel=0.1)
    assert shape.vocab == 32_000 and shape.kv_heads == 8 and shape.hidden % shape.heads == 0


def test_operations_by_hand() -> None:
    # 3 rows of 5 tokens: 2 a weight and token; in each layer 4·8 a token and key, 1 + 2 + 3 + 4 + 5 keys.
    trunk, head, attention = 3 * 2 * 1152 * 5, 3 * 2 * 800 * 4, 3 * 2 * 32 * 15
    assert SMALL.forward_flops(3, 5, 4) == trunk + head + attention == 34_560 + 19_200 + 2_880
    # The rows of such an update have 6 tokens, of which the last is not read.
    assert gpu.update_flops(SMALL, gpu.Load(rows=3, prompt=2, response=4)) == 3 * 56_640
    size = scaling.Size(rows=3, prompt=2, response=4, vocab=100, hidden=8, layers=2)
    assert scaling.operations(size, "iteration") == sum(scaling.operations(size, part) for part in scaling.PARTS)


def test_bytes_by_hand() -> None:
    # Keys and values: 2 layers · 2 · 4 numbers a token.
    assert SMALL.decode_bytes(rows=3, length=5, width=2) == 2 * (1952 + 3 * 5 * 16)
    # The steps that follow the prompts' forward: the second token reads 3 tokens a row, the fourth 5.
    load = gpu.Load(rows=3, prompt=2, response=4)
    assert gpu.decode_bytes(SMALL, load) == 2 * (3 * 1952 + 3 * (3 + 4 + 5) * 16)


def test_fractions_by_hand() -> None:
    load = gpu.Load(rows=3, prompt=2, response=4)
    device = gpu.Device("some device", bytes_per_second=12_864.0, flops_per_second=169_920.0)
    row = gpu.Found("small", SMALL, load, device, (1.0, 1.0, 9.0), (3.0,), (6.0,), (12.0,), (4.0,))
    assert gpu.decode_bytes(SMALL, load) == 12_864  # a second's worth, in two seconds of decoding
    assert row.decode_fraction == 0.5 and row.update_fraction == 0.25 and row.tokens_per_second == 4.0
    line = gpu.page([row]).splitlines()[-1]
    assert line == "| small | 3.00 | 4 | 50% | 2.00 × | 4.00 × | 4.00 | 25% |"


def test_a_fitted_exponent() -> None:
    values = [3, 6, 12, 24]
    assert scaling.exponent(values, [5 * value**1.7 for value in values]) == pytest.approx(1.7)
    # Least squares by hand: logarithms to base 2 are (0, 1, 2) and (0, 2, 2), so the slope is 1.
    assert scaling.exponent([1, 2, 4], [1, 4, 4]) == pytest.approx(1.0)


def test_the_theory_of_growth() -> None:
    def theory(size: str, **sizes: int) -> float:
        base = {"rows": 4, "response": 32, "prompt": 32, "vocab": 100, **sizes}
        counts = [
            scaling.operations(scaling.Size(**{**base, size: base[size] * factor}), "iteration") for factor in (1, 8)
        ]
        return math.log(counts[1] / counts[0], 8)

    assert theory("rows") == pytest.approx(1.0)
    assert 0 < theory("vocab") < 1 and theory("vocab", vocab=10**6) == pytest.approx(1.0, abs=0.01)
    # Attention to itself takes over in the end.
    assert theory("response", response=10**6, prompt=1) == pytest.approx(2.0, abs=0.01)


def test_scaling_in_a_tiny_size() -> None:
    base = scaling.Size(rows=2, response=3, prompt=4, vocab=20, hidden=16, layers=1)
    bases = dict.fromkeys(scaling.BASES, base)
    page, found = scaling.run(1, None, lambda line: None, bases, factors=(1, 2))
    assert [growth.size for growth in found[:: len(scaling.PHASES)]] == ["rows", "response", "prompt", "vocab"]
    for growth in found:
        start = getattr(base, growth.size)
        assert growth.values == (start, 2 * start) and [len(times) for times in growth.cpu_seconds] == [1, 1]
        ratio = growth.cpu_seconds[1][0] / growth.cpu_seconds[0][0]
        assert growth.exponent == pytest.approx(math.log2(ratio))
    assert f"| 2–4 | 3 | 4 | 20 | {found[0].exponent:.2f} | 1.00 |" in page and "hidden 16, 1 layers" in page


def test_memory_in_a_fresh_process() -> None:
    problem = memory.Problem(vocab=30_000, rows=4, tokens=128, hidden=32, layers=1)
    usage = memory.in_fresh_process(memory.UNCHUNKED, problem)
    logits = 4 * 128 * 30_000 * 4 / 2**20
    # Logits, log-probs and a gradient of one of them are held together; not more than two of these again.
    assert 3 * logits < usage.peak_mib < 5 * logits + 50
    assert usage.vocab == 30_000 and usage.before_mib > 100


@pytest.mark.slow
def test_memory_is_that_of_the_trunk() -> None:
    problem = memory.Problem(vocab=100_000, rows=4, tokens=128, hidden=64, layers=2)
    trunk, ours, unchunked = (memory.in_fresh_process(name, problem).peak_mib for name in memory.NAMES)
    assert ours < 1.3 * trunk + 3 * 16 and unchunked > 2 * ours  # a block of logits has 16 MiB


def test_each_competitor_of_memory_does_what_it_says() -> None:
    problem = memory.Problem(vocab=50, rows=2, tokens=6, hidden=16, layers=1)
    model = llama(Shape(50, 16, 1))
    ids = torch.randint(50, (2, 7), generator=torch.Generator().manual_seed(0))
    gradients = []
    for step in (lambda: memory._unchunked(model, ids), lambda: memory._trunk(model, ids)):
        model.zero_grad()
        step()
        gradients.append(model.lm_head.weight.grad)
    assert gradients[0].std() > 0 and (gradients[1] == 1).all()
    for name in memory.NAMES:
        memory.work(name, problem)()


def test_the_page_of_memory() -> None:
    rows = [
        memory.Usage("trunk", 512, 600.0, 100.0, (1.0, 2.0, 3.0)),
        memory.Usage("evaluate", 512, 601.0, 125.0, (3.0,)),
        memory.Usage("unchunked", 512, 602.0, 400.0, (4.0,)),
    ]
    page = memory.page(rows, memory.Problem(512))
    assert "| 512 | evaluate | 601 | 125 | 1.25 | 3.00 | 0.75 |" in page and "hidden 256, 4 layers" in page
    assert asdict(rows[1])["peak_mib"] == 125.0


def test_what_comes_first_is_not_timed() -> None:
    count = "sum(range(10**7))"
    slow, _ = startup.seconds("", count)
    quick, _ = startup.seconds(count, "pass")
    assert quick < 0.1 * slow


def test_start_up_times_what_is_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    told = {startup.BARE: (2.0, 3.0), startup.OURS: (2.5, 4.0)}
    monkeypatch.setattr(startup, "seconds", lambda before, timed: told[timed])
    page, found = startup.run(3, None, lambda line: None, (startup.BARE, startup.OURS))
    assert found[1].cpu_seconds == (2.5, 2.5, 2.5) and found[1].wall_seconds == (4.0, 4.0, 4.0)
    assert f"| {startup.OURS} | 2.50 | 2.50–2.50 | 1.25 |" in page


def test_the_device_case_runs_on_a_cpu() -> None:
    lines: list[str] = []
    page, found = gpu.run(1, None, lines.append, "cpu", ("tiny",), gpu.Load(rows=2, prompt=4, response=4, microbatch=1))
    assert 0 < found[0].decode_fraction < 1 and 0 < found[0].update_fraction < 1
    assert found[0].device.bytes_per_second > 1e8 and found[0].device.name in page
    assert len(lines) == 2


def test_the_device_case_refuses() -> None:
    with pytest.raises(ValueError, match=r"sizes: expected some of tiny, .*, got 9B"):
        gpu.run(1, None, print, "cpu", ("9B",))
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="device: expected one that is there, got cuda"):
            gpu.run(1, None, print)


def test_cases_that_are_not_run_again_stay_on_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from scripts.bench import Flags, main

    monkeypatch.setattr(gpu, "Load", partial(gpu.Load, rows=2, prompt=4, response=4, microbatch=2))
    old = {"text": "## Old\n\nwhat was found", "machine": "a box", "rounds": 3, "found": []}
    (tmp_path / "speed.json").write_text(json.dumps({"tax": old}), encoding="utf8")
    main(Flags(only=("gpu",), rounds=1, device="cpu", sizes=("tiny",), out=tmp_path))
    told = json.loads((tmp_path / "speed.json").read_text(encoding="utf8"))
    assert told["tax"] == old and told["gpu"]["found"][0]["name"] == "tiny"
    page = (tmp_path / "speed.md").read_text(encoding="utf8")
    assert page.index("what was found\n\na box; `--rounds 3`.") < page.index("## Against the limits of the device")


def test_an_unknown_case_is_refused() -> None:
    from scripts.bench import Flags

    with pytest.raises(ValueError, match=r"only: expected some of tax, trl, .*, gpu, got speed"):
        Flags(only=("speed",))


def test_samplers_are_measured_on_equal_work(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(samplers, "SHAPE", Shape(vocab=1000, hidden=16, layers=1, heads=2, kv_heads=2))
    monkeypatch.setattr(samplers, "ROWS", 3)
    live = {"transformers": samplers.TransformersSampler, "again": samplers.TransformersSampler}
    monkeypatch.setattr(samplers, "samplers", lambda: live)
    text, found = samplers.run(2, None, lambda line: None)
    assert [(timing.task, timing.name) for timing in found] == list(itertools.product(("equal", "ragged"), live))
    equal, _, ragged, again = found
    assert equal.tokens == (3 * samplers.EQUAL,) * 2 and len(equal.wall_seconds) == len(equal.push_seconds) == 2
    assert ragged.tokens == again.tokens and max(ragged.tokens) < 3 * samplers.RAGGED
    assert text.count("| again |") == 2 and "| equal | tokens/s |" in text
