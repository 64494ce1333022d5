"""Rows that start, grow and restart by themselves, against full forwards of each row alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import textenv.attention as attention
from tests.conftest import MAKERS, V, make_gpt2, make_llama, make_qwen2
from textenv.attention import attend_one
from textenv.decoders import row_decoder
from textenv.models import Shared
from textenv.packing import Packing, packed_hidden
from textenv.recompute import Decoder, RecomputeDecoder
from textenv.row_cache import RowDecoder

TOLERANCE = 2e-5
"""Float32 rounding in two layers of width 32; a wrong mask or position is off by more than 1."""

ROWS = 5
MODELS = {name: make() for name, make in MAKERS.items()}


def _alone(model: Any, ids: list[int]) -> torch.Tensor:
    """The final hidden state of one row, through the model's public forward: no cache, no padding, no mask."""
    with torch.no_grad():
        output = model(input_ids=torch.tensor([ids]), output_hidden_states=True, use_cache=False)
    return output.hidden_states[-1][0, -1]


def _prefill(decoder: Decoder, rows: list[int] | None, texts: list[list[int]]) -> torch.Tensor:
    width = max(1, *(len(text) for text in texts)) if texts else 1
    ids = torch.tensor([text + [V - 1] * (width - len(text)) for text in texts])
    index = None if rows is None else torch.tensor(rows)
    return decoder.prefill(index, ids, torch.tensor([len(text) for text in texts]))


token = st.integers(0, V - 1)
event = st.one_of(
    st.tuples(st.just("all"), st.lists(token, min_size=ROWS, max_size=ROWS)),
    st.tuples(st.just("some"), st.dictionaries(st.integers(0, ROWS - 1), token, min_size=1)),
    st.tuples(
        st.just("reset"),
        st.dictionaries(st.integers(0, ROWS - 1), st.lists(token, max_size=6), min_size=1),
    ),
)


@pytest.mark.parametrize("name", sorted(MODELS))
@pytest.mark.parametrize("kind", [RowDecoder, RecomputeDecoder])
@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(start=st.lists(st.lists(token, max_size=5), min_size=ROWS, max_size=ROWS), events=st.lists(event, max_size=14))
def test_any_history_equals_each_row_alone(name: str, kind: Any, start: list, events: list) -> None:
    model = MODELS[name]
    decoder = kind(model, ROWS, 8)  # short rows, so that it must grow too
    texts = [list(text) for text in start]
    _prefill(decoder, None, texts)
    for what, detail in events:
        if what == "reset":
            rows = list(detail)
            for row in rows:
                texts[row] = list(detail[row])
            got = _prefill(decoder, rows, [texts[row] for row in rows])
        elif what == "all":
            rows = list(range(ROWS))
            texts = [[*text, new] for text, new in zip(texts, detail, strict=True)]
            got = decoder.advance(torch.tensor(detail))
        else:
            rows = list(detail)
            for row in rows:
                texts[row].append(detail[row])
            got = decoder.advance(torch.tensor([detail[row] for row in rows]), torch.tensor(rows))
        assert decoder.lengths.tolist() == [len(text) for text in texts]
        for row, hidden in zip(rows, got, strict=True):
            if texts[row]:
                assert torch.allclose(hidden, _alone(model, texts[row]), atol=TOLERANCE)


def test_equal_lengths_take_the_path_without_a_mask(tiny_lm: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    decoder = RowDecoder(tiny_lm, 4, 16)
    ids = torch.randint(0, V, (4, 12), generator=torch.Generator().manual_seed(0))
    got = [decoder.prefill(None, ids[:, :5], torch.full((4,), 5))]
    masks = []
    inner = decoder._forward
    monkeypatch.setattr(decoder, "_forward", lambda i, m, p: masks.append(m) or inner(i, m, p))
    got += [decoder.advance(ids[:, t]) for t in range(5, 12)]
    assert masks == [None] * 7
    for column, hidden in enumerate(got, start=5):
        for row in range(4):
            assert torch.allclose(hidden[row], _alone(tiny_lm, ids[row, :column].tolist()), atol=TOLERANCE)


def test_long_run_with_many_restarts(tiny_gpt2: Any) -> None:
    generator = torch.Generator().manual_seed(3)
    decoder = RowDecoder(tiny_gpt2, 8, 64)
    texts = [[int(x)] for x in torch.randint(0, V, (8,), generator=generator)]
    _prefill(decoder, None, texts)
    restarts = 0
    for _ in range(60):
        ends = [row for row in range(8) if torch.rand(1, generator=generator) < 0.2]
        if ends:
            restarts += len(ends)
            for row in ends:
                size = int(torch.randint(0, 7, (1,), generator=generator))
                texts[row] = torch.randint(0, V, (size,), generator=generator).tolist()
            _prefill(decoder, ends, [texts[row] for row in ends])
        new = torch.randint(0, V, (8,), generator=generator)
        texts = [[*text, int(x)] for text, x in zip(texts, new, strict=True)]
        hidden = decoder.advance(new)
        for row in range(8):
            assert torch.allclose(hidden[row], _alone(tiny_gpt2, texts[row]), atol=TOLERANCE)
    assert restarts > 60


@pytest.mark.parametrize("kind", [RowDecoder, RecomputeDecoder])
def test_keep_renumbers_rows(tiny_lm: Any, kind: Any) -> None:
    decoder = kind(tiny_lm, 4, 8)
    texts = [[3, 4], [5], [6, 7, 8], [9, 9]]
    _prefill(decoder, None, texts)
    decoder.keep(torch.tensor([3, 1]))
    hidden = decoder.advance(torch.tensor([10, 11]))
    assert decoder.lengths.tolist() == [3, 2]
    assert torch.allclose(hidden[0], _alone(tiny_lm, [9, 9, 10]), atol=TOLERANCE)
    assert torch.allclose(hidden[1], _alone(tiny_lm, [5, 11]), atol=TOLERANCE)


def test_eager_attention(tiny_lm: Any) -> None:
    tiny_lm.set_attn_implementation("eager")
    decoder = RowDecoder(tiny_lm, 3, 8)
    _prefill(decoder, None, [[3, 4], [5], [6, 7, 8]])
    hidden = decoder.advance(torch.tensor([10, 11, 12]))
    assert torch.allclose(hidden[1], _alone(tiny_lm, [5, 11]), atol=TOLERANCE)


@pytest.mark.parametrize("kind", [RowDecoder, RecomputeDecoder])
def test_gradient_checkpointing_in_train_mode_does_not_drop_the_cache(tiny_lm: Any, kind: Any) -> None:
    expected = _alone(tiny_lm, [5, 6, 7])
    tiny_lm.gradient_checkpointing_enable()
    tiny_lm.train()
    for module in tiny_lm.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    decoder = kind(tiny_lm, 1, 8)
    _prefill(decoder, None, [[5, 6]])
    assert torch.allclose(decoder.advance(torch.tensor([7]))[0], expected, atol=TOLERANCE)
    assert tiny_lm.training and tiny_lm.is_gradient_checkpointing


def test_a_shared_model_runs_within_its_context(tiny_llama: Any) -> None:
    entered = []

    class Context:
        def __enter__(self) -> None:
            entered.append(1)

        def __exit__(self, *_: object) -> None: ...

    decoder = RowDecoder(Shared(tiny_llama, within=Context), 1, 8)
    _prefill(decoder, None, [[5, 6]])
    decoder.advance(torch.tensor([7]))
    assert len(entered) == 2


def test_the_choice_of_decoder() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    size = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    heads = {"num_attention_heads": 2, "num_key_value_heads": 1}
    for make in (make_llama, make_gpt2, make_qwen2):
        assert isinstance(row_decoder(make(), 2, 16), RowDecoder)
    mistral = MistralForCausalLM(MistralConfig(**size, **heads, sliding_window=4, initializer_range=0.3)).eval()
    decoder = row_decoder(mistral, 2, 16)
    assert isinstance(decoder, RecomputeDecoder)
    _prefill(decoder, None, [[3, 4, 5, 6, 7, 8], [3]])
    hidden = decoder.advance(torch.tensor([9, 4]))
    assert torch.allclose(hidden[0], _alone(mistral, [3, 4, 5, 6, 7, 8, 9]), atol=TOLERANCE)
    assert torch.allclose(hidden[1], _alone(mistral, [3, 4]), atol=TOLERANCE)


def test_a_window_as_long_as_the_rows_is_cached_and_not_outgrown() -> None:
    from transformers import MistralConfig, MistralForCausalLM

    size = {"vocab_size": V, "hidden_size": 16, "num_hidden_layers": 2, "intermediate_size": 16}
    mistral = MistralForCausalLM(
        MistralConfig(**size, num_attention_heads=2, num_key_value_heads=1, sliding_window=4, initializer_range=0.3)
    ).eval()
    decoder = row_decoder(mistral, 2, 4)
    assert isinstance(decoder, RowDecoder)
    _prefill(decoder, None, [[3, 4, 5], [3]])
    hidden = decoder.advance(torch.tensor([9, 4]))
    assert torch.allclose(hidden[0], _alone(mistral, [3, 4, 5, 9]), atol=TOLERANCE)
    with pytest.raises(ValueError, match="window"):
        decoder.advance(torch.tensor([9, 4]))


@pytest.mark.parametrize("kind", [RowDecoder, RecomputeDecoder])
def test_refusals(tiny_llama: Any, kind: Any) -> None:
    with pytest.raises(ValueError, match="rows and columns"):
        kind(tiny_llama, 0, 8)
    decoder = kind(tiny_llama, 2, 8)
    with pytest.raises(ValueError, match="ids must be"):
        decoder.prefill(torch.tensor([0]), torch.zeros(2, 3).long(), torch.tensor([3, 3]))
    with pytest.raises(ValueError, match="lengths must be between 0 and 3"):
        decoder.prefill(None, torch.zeros(2, 3).long(), torch.tensor([3, 4]))
    with pytest.raises(ValueError, match="tokens must be one per row"):
        decoder.advance(torch.tensor([1, 2, 3]))


def test_a_real_model(material: Any) -> None:
    from textenv.models import load_causal_lm

    model = load_causal_lm(material / "models" / "stories260K", argument="model").module
    decoder = RowDecoder(model, 2, 16)
    _prefill(decoder, None, [[1, 403, 407], [1]])
    hidden = decoder.advance(torch.tensor([261, 403]))
    assert torch.allclose(hidden[0], _alone(model, [1, 403, 407, 261]), atol=1e-4)
    assert torch.allclose(hidden[1], _alone(model, [1, 403]), atol=1e-4)


@pytest.mark.parametrize("heads", [(4, 4), (6, 2)])
@pytest.mark.parametrize("masked", ["none", "bool", "added"])
@pytest.mark.parametrize("scaling", [None, 0.3])
@pytest.mark.parametrize("fused", [False, True])
def test_attention_of_one_token_is_that_of_a_loop(
    heads: tuple[int, int], masked: str, scaling: float | None, fused: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(attention, "_PRODUCTS_WIN", () if fused else ("cpu",))
    (queries, keys), size, width, rows = heads, 5, 7, 3
    generator = torch.Generator().manual_seed(0)
    query = torch.randn(rows, queries, 1, size, generator=generator)
    key, value = torch.randn(2, rows, keys, width, size, generator=generator)
    shown = torch.tensor([[True] * 7, [True] * 3 + [False] * 4, [True] + [False] * 6])[:, None, None]
    mask = {"none": None, "bool": shown, "added": torch.where(shown, 0.0, -torch.inf)}[masked]
    found, _ = attend_one(torch.nn.Module(), query, key, value, mask, scaling=scaling)
    assert found.shape == (rows, 1, queries, size)
    for row in range(rows):
        for head in range(queries):
            group = head * keys // queries
            held = int(shown[row].sum()) if masked != "none" else width
            scores = [
                (query[row, head, 0].double() @ key[row, group, i].double()) * (scaling or size**-0.5)
                for i in range(held)
            ]
            weights = torch.stack(scores).softmax(0)
            expected = sum(weights[i] * value[row, group, i].double() for i in range(held))
            torch.testing.assert_close(found[row, 0, head].double(), expected, rtol=0, atol=1e-6)


def test_a_decoder_borrows_the_attention_and_gives_it_back(tiny_llama: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    kinds = []

    def forward(self: Any, *args: Any) -> Any:
        kinds.append(self._config._attn_implementation)
        if len(kinds) == 3:
            raise KeyboardInterrupt
        return original(self, *args)

    original = RowDecoder._forward
    monkeypatch.setattr(RowDecoder, "_forward", forward)
    decoder = RowDecoder(tiny_llama, 1, 8)
    _prefill(decoder, None, [[1, 2]])
    decoder.advance(torch.tensor([3]))
    with pytest.raises(KeyboardInterrupt):
        decoder.advance(torch.tensor([3]))
    assert kinds == ["sdpa", "textenv_one_token", "textenv_one_token"]
    assert tiny_llama.config._attn_implementation == "sdpa"


def test_a_compiled_trunk_learns_compiled_and_decodes_as_it_is() -> None:
    graphs = []

    def backend(graph: Any, inputs: Any) -> Any:
        graphs.append(graph)
        return graph.forward

    plain, compiled = make_llama(), make_llama()
    compiled.base_model.compile(backend=backend)
    ids, lengths = torch.randint(V, (3, 6), generator=torch.Generator().manual_seed(0)), torch.tensor([6, 2, 4])
    pack = Packing.of(lengths)
    found = [packed_hidden(lm.base_model, ids, pack) for lm in (plain, compiled)]
    torch.testing.assert_close(*found, rtol=0, atol=TOLERANCE)
    learnt = len(graphs)
    assert learnt > 0
    decoders = [RowDecoder(lm, 3, 12) for lm in (plain, compiled)]
    for decoder in decoders:
        decoder.prefill(None, ids, lengths)
    for step in range(4):
        one, two = (decoder.advance(ids[:, step]) for decoder in decoders)
        torch.testing.assert_close(one, two, rtol=0, atol=TOLERANCE)
    assert len(graphs) == learnt


@pytest.mark.parametrize("which", ["narrow values", "a mask of each head", "rows without padding", "two tokens"])
def test_what_one_token_attention_does_not_do_is_left_to_sdpa(which: str) -> None:
    from transformers.integrations.sdpa_attention import sdpa_attention_forward

    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 4, 1, 6, generator=generator), torch.randn(2, 4, 5, 6, generator=generator)
    value, mask, others = torch.randn(2, 4, 5, 6, generator=generator), None, {}
    if which == "narrow values":
        value = value[..., :3]
    elif which == "a mask of each head":
        mask = torch.randn(2, 4, 1, 5, generator=generator)
    elif which == "two tokens":
        query = torch.randn(2, 4, 5, 6, generator=generator)
    else:
        query, key, value = (t[:1, :, :1].expand(1, 4, 5, 6) for t in (query, key, value))
        pack = Packing.of(torch.tensor([2, 3]))
        mask, others = pack.mask, {"packing": pack}
    layer = torch.nn.Module()
    found, _ = attend_one(layer, query, key, value, mask, scaling=0.4, **others)
    expected, _ = (attention.attend_packed if others else sdpa_attention_forward)(
        layer, query, key, value, mask, scaling=0.4, **others
    )
    torch.testing.assert_close(found, expected)


def test_fixed_steps_want_sdpa() -> None:
    decoder = RowDecoder(make_llama(attn_implementation="eager"), 2, 8)
    with pytest.raises(ValueError, match="attention: expected \"sdpa\", got 'eager'"):
        decoder.fixed_step()
