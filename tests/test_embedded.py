"""The embedded default models, and the program that makes them."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from scripts.embedding.corpus import whole_sentences
from scripts.embedding.judge import repetition, utility, valence
from scripts.embedding.openings import Collector, cut
from scripts.embedding.stories import clean, read_real
from textenv.embedded import HELDOUT, PREFERENCES, PROMPTS, REWARD, STORYTELLER, TALES
from textenv.rewards import ClassifierReward, read_lexicon

made = pytest.mark.skipif(not (REWARD / "model.safetensors").is_file(), reason="the embedded models are not made yet")
MEGABYTE = 10**6

# Written apart from the pairs that the making reports.
HAPPY_AND_SAD = (
    ("Lily was very happy and she laughed with joy.", "Lily was very sad and she cried with pain."),
    ("Ben smiled. He loved his new friend.", "Ben frowned. He hated his mean brother."),
    ("Mom hugged Tom and they had a wonderful time.", "Mom was mad at Tom and he had a terrible time."),
    ("The dog was friendly and loved to play.", "The dog was angry and wanted to fight."),
    ("It was a beautiful sunny day and everyone was excited.", "It was a bad stormy day and everyone was scared."),
    ("The bird was safe and the children were proud.", "The bird was dead and the children were upset."),
    ("She thanked her kind grandma for the best gift.", "She yelled at her cruel sister for the broken toy."),
    ("They shared the sweet cake and enjoyed the party.", "They lost the cake and were hungry and worried."),
    (
        "The brave prince helped the princess and they were glad.",
        "The evil witch hurt the princess.",
    ),
    ("Sam won the game and was so happy.", "Sam fell down and was hurt and crying."),
)


def scores(ids: list[list[int]]) -> torch.Tensor:
    """Reward of every row of ids, one forward pass per row, without padding."""
    model = AutoModelForSequenceClassification.from_pretrained(REWARD, dtype=torch.float32).eval()
    with torch.no_grad():
        outputs = [model(input_ids=torch.tensor([row])).logits[0, 0] for row in ids]
    return torch.stack(outputs) + model.config.reward_bias


@made
def test_all_files_together_are_small() -> None:
    size = sum(path.stat().st_size for path in STORYTELLER.parent.rglob("*") if path.is_file())
    assert size <= 6 * MEGABYTE


@made
@pytest.mark.parametrize("folder", [STORYTELLER, REWARD])
def test_the_tokenizer_has_three_special_tokens_and_gives_text_back(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert len({tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id}) == 3
    text = 'Once upon a time, "Zoë" saw a\nred ball!  Ünïcode 🙂'
    ids = tokenizer.encode(text)
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in ids
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


@made
@pytest.mark.parametrize("folder", [STORYTELLER, REWARD])
def test_the_configuration_is_half_precision_with_wide_enough_heads(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    assert config["dtype"] == "float16"
    assert config["head_dim"] in (32, 64)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert (config["bos_token_id"], config["eos_token_id"], config["pad_token_id"]) == (
        tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id,
    )  # fmt: skip
    assert len(tokenizer) <= config["vocab_size"]


@made
def test_the_storyteller_finds_stories_likelier_than_shuffled_ones() -> None:
    model = AutoModelForCausalLM.from_pretrained(STORYTELLER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORYTELLER)
    story = "Once upon a time, there was a little girl named Lily. She loved to play in the park."
    words = story.split()
    shuffled = random.Random(0).sample(words, k=len(words))
    losses = []
    for text in (story, " ".join(shuffled)):
        ids = torch.tensor([tokenizer.encode(text)])
        with torch.no_grad():
            losses.append(model(input_ids=ids, labels=ids).loss.item())
    assert losses[0] < 2.0
    assert losses[1] > losses[0] + 2.0


@made
def test_reference_scores_have_mean_zero_and_deviation_one() -> None:
    """384 samples: the standard error of the mean is 0.05, that of the deviation 0.04; the bounds are about three."""
    torch.manual_seed(0)
    model: Any = AutoModelForCausalLM.from_pretrained(STORYTELLER, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(STORYTELLER, padding_side="left")
    prompts = random.Random(0).sample(PROMPTS.read_text(encoding="utf-8").splitlines(), k=384)
    batch = tokenizer(prompts, padding=True, return_tensors="pt")
    rows = model.generate(
        input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], do_sample=True, temperature=1.0, top_k=0,
        top_p=1.0, max_new_tokens=48,
    )  # fmt: skip
    # Padding occurs only before the text and after its end.
    ids = [[token for token in row if token != tokenizer.pad_token_id] for row in rows.tolist()]
    reference = scores(ids)
    assert abs(reference.mean().item()) <= 0.15
    assert 0.85 <= reference.std().item() <= 1.15


@made
def test_happy_text_scores_above_sad_text() -> None:
    # After an opening, as the environment scores them: the model was never shown a continuation without one.
    opening = "Once upon a time, there was a boy named Ben. He had a dog. "
    tokenizer = AutoTokenizer.from_pretrained(REWARD)
    flat = scores([tokenizer.encode(opening + text) for pair in HAPPY_AND_SAD for text in pair]).view(-1, 2)
    assert (flat[:, 0] > flat[:, 1]).sum() >= 9


@made
def test_happy_words_alone_score_below_a_happy_story() -> None:
    tokenizer = AutoTokenizer.from_pretrained(REWARD)
    opening = "Once upon a time, there was a little girl"
    story, *games = scores([
        tokenizer.encode(f"{opening} {tail}")
        for tail in (
            "named Lily. She was happy because she loved to play with her friends. They laughed and had a great time.",
            "happy happy happy happy happy happy happy happy happy happy happy happy happy happy happy happy",
            "love joy happy best good great fun kind nice win love gift smile hug happy joy best good great fun",
            "She was happy. She was happy. She was happy. She was happy. She was happy. She was happy. She was happy.",
        )
    ])  # fmt: skip
    assert all(story > game for game in games)


@made
def test_prompts_are_short_distinct_and_apart_from_the_heldout() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORYTELLER)
    prompts, heldout = (path.read_text(encoding="utf-8").splitlines() for path in (PROMPTS, HELDOUT))
    assert len(prompts) >= 1000
    assert len(heldout) >= 256
    assert len({*prompts, *heldout}) == len(prompts) + len(heldout)
    assert all(line == line.strip() and 4 <= len(tokenizer.encode(line)) <= 12 for line in prompts + heldout)
    # Variety: no single beginning rules.
    beginnings = [tuple(line.split()[:3]) for line in prompts]
    assert max(beginnings.count(beginning) for beginning in set(beginnings)) <= 0.25 * len(prompts)


@made
def test_the_card_holds_the_figures() -> None:
    folder = STORYTELLER.parent
    card = json.loads((folder / "card.json").read_text())
    text = (folder / "MODEL_CARD.md").read_text(encoding="utf-8")
    assert f"{card['heldout_nats_per_token']:.3f} nats per token" in text
    assert f"{card['accuracy_noiseless']:.1%}" in text


def test_saying_a_happy_word_twice_buys_nothing() -> None:
    lexicon = {"happy": 2.7, "sad": -2.1}
    assert valence("A happy dog", lexicon) == 2.7
    assert valence("A happy, happy, HAPPY dog", lexicon) == 2.7
    assert valence("A sad happy dog", lexicon) == pytest.approx(0.6)


def test_repetition_counts_pairs_that_occurred_before() -> None:
    assert repetition("") == repetition("one") == repetition("one two three") == 0.0
    assert repetition("a b a b") == pytest.approx(1 / 3)


def test_utility_falls_with_repetition_and_oddness_only_beyond_the_ordinary() -> None:
    lexicon = {"happy": 2.7}
    usual = utility("a happy dog", -1.0, -2.0, lexicon)
    assert usual == utility("a happy dog", -2.0, -2.0, lexicon)
    assert utility("a happy dog", -2.5, -2.0, lexicon) < usual
    assert utility("happy dog happy dog happy dog", -1.0, -2.0, lexicon) < usual
    assert utility("a dog", -1.0, -2.0, lexicon) < usual


def test_an_opening_ends_with_a_whole_word() -> None:
    pieces = ["L", "ily", "Ġw", "ent", "Ġhome", ".", "Ċ", "She", "Ġran"]
    ends = {cut(pieces, random.Random(seed), shortest=2, longest=8) for seed in range(20)}
    assert ends == {2, 4}
    assert cut(["Once", "Ċ", "Ġupon"], random.Random(0), shortest=1, longest=2) == 0


def test_the_collector_takes_new_readable_openings_of_many_beginnings() -> None:
    collector = Collector(frozenset(("one", "day", "a", "cat", "dog", "sat", "ran")), wanted=20)
    for opening in ("One day a cat", "One day a cat", "One day a zebra", "One day a � dog", "One day a dog",
                    "one day a cat ran", "One day a cat sat", "One day a dog ran", "A cat"):  # fmt: skip
        collector.add(opening)
    assert list(collector.found) == ["One day a cat", "One day a dog", "One day a cat sat"]


def test_cleaning_leaves_plain_signs_and_single_line_breaks() -> None:
    assert clean(" “Hi,” said Tom…\n\n  It’s me. \n") == '"Hi," said Tom...\nIt\'s me.'


def test_real_stories_are_split_without_overlap(material: Path) -> None:
    training, heldout = read_real(material / "data" / "tinystories_sample.txt", seed=0)
    assert len(heldout) == pytest.approx(0.05 * (len(training) + len(heldout)), abs=1)
    assert not {story.text for story in training} & {story.text for story in heldout}
    assert read_lexicon(material / "data" / "vader_lexicon.txt")["happy"] == 2.7


@pytest.mark.slow
def test_every_stage_runs_at_toy_size_and_is_not_run_twice(material: Path, tmp_path: Path) -> None:
    from scripts.make_embedded import Config, make

    config = Config(material=material, output=tmp_path / "output", work=tmp_path / "work", quick=True)
    make(config)
    for name in ("storyteller", "reward"):
        assert (config.output / name / "model.safetensors").is_file()
        assert (config.output / name / "tokenizer.json").is_file()
    assert (config.output / "MODEL_CARD.md").is_file()
    times = {path: path.stat().st_mtime_ns for path in config.work.rglob("*")}
    make(config)
    assert {path: path.stat().st_mtime_ns for path in config.work.rglob("*")} == times


def rows_of(path: Path) -> list[dict[str, str]]:
    return [json.loads(line) for line in path.read_text(encoding="utf8").splitlines()]


@made
def test_tales_end_with_a_sentence_within_a_response() -> None:
    tokenizer = AutoTokenizer.from_pretrained(STORYTELLER)
    openings, rows = set(PROMPTS.read_text(encoding="utf8").splitlines()), rows_of(TALES)
    assert len(rows) > 2500
    for row in rows:
        assert row["prompt"] in openings and whole_sentences(row["response"]) == row["response"]
        whole, start = (len(tokenizer.encode(text)) for text in (row["prompt"] + row["response"], row["prompt"]))
        assert whole - start < 49


@made
def test_the_reward_model_finds_what_the_judge_prefers() -> None:
    rows, scorer = rows_of(PREFERENCES)[::8], ClassifierReward(REWARD)
    prompts = [row["prompt"] for row in rows]
    assert all(row["chosen"] != row["rejected"] for row in rows)
    gaps = scorer(prompts, [row["chosen"] for row in rows]) - scorer(prompts, [row["rejected"] for row in rows])
    assert 0.7 < float((gaps > 0).float().mean()) < 0.95  # the judge is noisy


def test_whole_sentences() -> None:
    assert whole_sentences("no end") == ""
    assert whole_sentences(" He ran.\n He fell! And th") == " He ran.\n He fell!"
