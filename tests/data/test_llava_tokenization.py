"""Reference mode against original LLaVA: its published and observed ids, and an emulation on sentencepiece for the rest.

The emulation (`llama_oracle`) is held against the same vectors first.
"""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.templates import v0
from reverie_jax.data.tokenization import Encoder, load_tokenizer
from reverie_jax.errors import UserError
from tests.data import llama_oracle
from tests.data.llama_oracle import IMAGE, KINDS, SlowLlama

PATCHES = 3
FILLER = 0  # the original format has no image token

PAIRS = [
    *((template, kind) for template in ("vicuna_v1", "llava_v1", "llava_v0") for kind in ("legacy", "modern")),
    ("phi3_instruct", "phi3"),
]
"""Templates with the tokenizers that their models have."""


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """transformers' own, of folders as the Llama and Phi-3 repositories have them."""

    def load(kind: str):
        folder: Path = llama_oracle.write_tokenizer(tmp_path_factory.mktemp(kind), kind)
        return load_tokenizer(folder)

    return {kind: load(kind) for kind in KINDS}


@pytest.fixture(scope="module")
def encoder(tokenizers):
    return functools.cache(lambda template, kind: Encoder(tokenizers[kind], template, PATCHES, FILLER, "llava"))


def conversation(turns: tuple[str, ...] | list[str], weights: tuple[float, ...] = ()) -> Conversation:
    """Turns, user first; every marker shows the record's only picture."""
    spoken = tuple(
        Turn(("user", "assistant")[n % 2], text, weights[n // 2] if n % 2 and weights else 1.0)
        for n, text in enumerate(turns)
    )
    return Conversation(spoken, (0,) * sum(text.count(IMAGE) for text in turns))


def bare(ids: np.ndarray, image_slots: np.ndarray) -> list[int]:
    """Ids with -200 where a picture's positions stand; these are whole and in order."""
    out = [int(id) for id, feature in zip(ids, image_slots, strict=True) if feature < 0]
    starts = np.flatnonzero(image_slots == 0)
    for start in starts:
        assert image_slots[start : start + PATCHES].tolist() == list(range(PATCHES))
        assert (ids[start : start + PATCHES] == FILLER).all()
    assert (image_slots >= 0).sum() == PATCHES * len(starts)
    for number, start in enumerate(starts):
        out.insert(start - number * (PATCHES - 1), llama_oracle.IMAGE_ID)
    return out


def held(encoder, template: str, kind: str, turns: list[str]) -> None:
    """A taught conversation's ids, features and taught positions are the oracle's."""
    found = encoder(template, kind)(conversation(turns))
    item = llama_oracle.training(SlowLlama(kind), template, turns)
    assert bare(found.ids, found.image_slots) == item.ids
    wanted = item.expanded(PATCHES, FILLER)
    assert found.ids.tolist() == wanted.ids
    assert np.flatnonzero(found.weights).tolist() == wanted.taught


# --- what was observed -------------------------------------------------------------------------------------------

PUBLISHED = """1 319 13563 1546 263 12758 5199 322 385 23116 21082 20255 29889 450 20255 4076 8444 29892 13173 29892
322 1248 568 6089 304 278 5199 29915 29879 5155 29889 3148 1001 29901 29871 -200 29871 13 12148 8453 445 1967 297
9493 29889 319 1799 9047 13566 29901"""
DESCRIBE = [f"{IMAGE}\nPlease describe this image in detail."]
DIALOGUE = [f"{IMAGE}\nWhat is this?", "A cat.", "Color?", "Black"]
PHI3 = """1 29871 32006 3492 526 263 8444 319 29902 20255 29889 32007 32010 -200 29871 13 5618 338 445 29973 32007
32001 29909 6635 29889 32007 32010 3306 29973 32007 32001 18700 32007"""
SECOND_ROUND = {
    "legacy": "3148 1001 29901 9159 29973 319 1799 9047 13566 29901 6054 2",
    "modern": "11889 29901 9159 29973 319 1799 9047 13566 29901 6054 2",
}
TAUGHT = {
    ("vicuna_v1", "legacy"): [*range(47, 51), 61, 62],
    ("vicuna_v1", "modern"): [*range(47, 51), 60, 61],
    ("llava_v1", "legacy"): [*range(47, 51), 61, 62],
    ("llava_v1", "modern"): [*range(47, 51), 60, 61],
    ("llava_v0", "legacy"): [33, 34, *range(46, 57), *range(62, 72)],
    ("llava_v0", "modern"): [33, 34, *range(46, 57), *range(62, 72)],
    ("phi3_instruct", "phi3"): [22, 23, 24, 25, 31, 32],
}
LENGTH = {"legacy": 63, "modern": 62, "phi3": 33}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("kind", ["legacy", "modern"])
@pytest.mark.parametrize("template", ["llava_v1", "vicuna_v1"])
def test_prompt_is_the_published_one(encoder, template, kind):
    expected = [1404 if id == 5199 and template == "vicuna_v1" else id for id in numbers(PUBLISHED)]
    assert len(expected) == 50
    assert llama_oracle.question(SlowLlama(kind), template, DESCRIBE) == expected
    found = encoder(template, kind)(conversation(DESCRIBE))
    assert bare(found.ids, found.image_slots) == expected
    assert not found.weights.any()


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_oracle_teaches_what_the_original_was_seen_to_teach(template, kind):
    item = llama_oracle.training(SlowLlama(kind), template, DIALOGUE)
    assert item.taught == TAUGHT[template, kind]
    assert len(item.ids) == (72 if template == "llava_v0" else LENGTH[kind])


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_sample_teaches_what_the_original_was_seen_to_teach(encoder, template, kind):
    found = encoder(template, kind)(conversation(DIALOGUE))
    ids = bare(found.ids, found.image_slots)
    assert len(ids) == (72 if template == "llava_v0" else LENGTH[kind])
    text = [place if place < ids.index(-200) else place + PATCHES - 1 for place in TAUGHT[template, kind]]
    assert np.flatnonzero(found.weights).tolist() == text


@pytest.mark.parametrize("kind", ["legacy", "modern"])
def test_second_round_follows_the_end_token_as_the_tokenizers_kind_has_it(encoder, kind):
    found = encoder("vicuna_v1", kind)(conversation(DIALOGUE))
    ids = bare(found.ids, found.image_slots)
    assert ids[42:51] == numbers("319 1799 9047 13566 29901 319 6635 29889 2")
    assert ids[51:] == numbers(SECOND_ROUND[kind])


def test_phi3_sample_is_the_observed_one(encoder):
    found = encoder("phi3_instruct", "phi3")(conversation(DIALOGUE))
    assert bare(found.ids, found.image_slots) == numbers(PHI3)


@pytest.mark.parametrize("kind", ["legacy", "modern"])
def test_caption_is_taught_with_its_newline(encoder, kind):
    said = [f"Describe it.\n{IMAGE}", "A cat."]
    found = encoder("plain", kind)(conversation(said))
    assert bare(found.ids, found.image_slots) == [1, -200, 319, 6635, 29889, 13]
    assert found.weights.tolist() == [0] * (1 + PATCHES) + [1] * 4
    held(encoder, "plain", kind, said)


# --- weights -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("template", "kind"), [pair for pair in PAIRS if pair[0] != "llava_v0"])
@pytest.mark.parametrize("weights", [(0.5, 2.0), (0.0, 1.0), (1.0, 0.0)])
def test_a_rounds_tokens_carry_its_answers_weight(encoder, template, kind, weights):
    found = encoder(template, kind)(conversation(DIALOGUE, weights)).weights
    taught = [place + PATCHES - 1 for place in TAUGHT[template, kind]]
    assert found[taught].tolist() == [weights[0]] * 4 + [weights[1]] * 2
    assert not np.delete(found, taught).any()


def test_weights_of_v0_come_in_the_answers_order(encoder):
    found = encoder("llava_v0", "modern")(conversation(DIALOGUE, (0.5, 2.0))).weights
    carried = found[found > 0].tolist()
    assert len(carried) == 23
    assert set(carried) == {0.5, 2.0}
    assert carried == sorted(carried)


# --- whole samples that are taught nothing -------------------------------------------------------------------------

WIPED = {
    "role inside": "The model says ASSISTANT: hello",
    "role, then a space": " ASSISTANT: hello",
    "end token inside": "One</s>two",
    "end token in front": "</s>two",
    "empty": "",
    "unknown token": "An <unk> word",
}
KEPT = {
    "leading space": "  A cat.",
    "trailing space": "A cat.  ",
    "leading newline": "\nA cat.",
    "role at the start": "ASSISTANT: hello",  # the first `ASSISTANT: ` takes the space that a second would begin with
    "role without a space": "ASSISTANT:hello",
    "three hashes": "### A cat. ###",
    "placeholder-like": "<image > and < image>",
}


@pytest.mark.parametrize("kind", ["legacy", "modern"])
@pytest.mark.parametrize("image", [True, False], ids=["picture", "text"])
@pytest.mark.parametrize("answer", WIPED.values(), ids=WIPED)
def test_a_count_that_does_not_come_out_wipes_the_whole_sample(encoder, kind, image, answer):
    asked = f"{IMAGE}\nWhat is this?" if image else "What is this?"
    dialogues = [[asked, answer], [asked, "A cat.", "And this?", answer]]
    if answer:  # an empty one runs into the next round, and the count is right again
        dialogues.append([asked, answer, "And this?", "A cat."])
    for turns in dialogues:
        assert not llama_oracle.training(SlowLlama(kind), "vicuna_v1", turns).taught
        assert not encoder("vicuna_v1", kind)(conversation(turns)).weights.any()


@pytest.mark.parametrize("kind", ["legacy", "modern"])
@pytest.mark.parametrize("answer", KEPT.values(), ids=KEPT)
def test_harmless_answers_are_taught(encoder, kind, answer):
    turns = [f"{IMAGE}\nWhat is this?", answer, "And this?", answer]
    assert llama_oracle.training(SlowLlama(kind), "vicuna_v1", turns).taught
    held(encoder, "vicuna_v1", kind, turns)


@pytest.mark.parametrize("answer", ["A cat.<|end|>", "a<|end|>\n<|assistant|>\nb", "<|end|>", "", "an <unk> word"])
def test_phi3_wipes_too(encoder, answer):
    for turns in ([f"{IMAGE}\nWhat?", answer], ["What?", "A cat.", "And?", answer]):
        assert not llama_oracle.training(SlowLlama("phi3"), "phi3_instruct", turns).taught
        assert not encoder("phi3_instruct", "phi3")(conversation(turns)).weights.any()


def test_a_sample_past_the_published_length_is_not_checked(encoder):
    turns = [f"{IMAGE}\nWhat is this?", "cat " * 2100 + "<unk>"]
    assert llama_oracle.training(SlowLlama("modern"), "vicuna_v1", turns).taught
    held(encoder, "vicuna_v1", "modern", turns)


def test_empty_words_leave_no_separator(encoder):
    # The original prints `ROLE:` for an empty message, neither a space nor an end token behind it.
    for turns in ([f"{IMAGE}\nWhat?", ""], ["What?", "", "And?", "A cat."], ["What?", "A cat.", "", "A dog."]):
        for template, kind in PAIRS:
            held(encoder, template, kind, turns)


# --- anything that is said -----------------------------------------------------------------------------------------

WORDS = [
    *("a", "Is", "cup", "Black", "image?", "it's", "12", "(red)", "Yes,", "."),
    *(" ", "  ", "   ", "\n", "\n\n", "\t", " \n ", "\r\n"),
    *("é", "e\u0301", "猫", "図。", "🍵", "👩‍👩‍👧", "العربية", "Ω≈ç", "\u00a0", "\u3000", "\u200b", "\u0085"),
    *("<0x0A>", "<|", "|>", "<", ">", "</", "s>", "http://x.y/?q=1", "`x = 1`", "  - item", "\\n", "'", '"'),
    *("USER: ", "ASSISTANT: ", "ASSISTANT:", "Human: ", "Assistant:", "###", "### ", "# "),
]
TRAPS = [*WORDS, " ASSISTANT: ", "</s>", "<s>", "<unk>", "<|end|>", "<|user|>", "<|assistant|>\n", "<|endoftext|>", "▁"]


def speech(words: list[str], smallest: int = 1) -> st.SearchStrategy[str]:
    said = st.lists(st.sampled_from(words), min_size=smallest, max_size=8).map("".join)
    free = st.text(st.characters(exclude_categories=("Cs",)), min_size=smallest, max_size=12)
    return (said | free).filter(lambda text: IMAGE not in text)


@st.composite
def dialogues(draw: st.DrawFn, words: list[str], smallest: int = 1) -> list[str]:
    """One to four exchanges, a picture or none, its marker anywhere in any question."""
    turns = draw(st.integers(1, 4).flatmap(lambda n: st.lists(speech(words, smallest), min_size=2 * n, max_size=2 * n)))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        n = draw(st.sampled_from([0, 0, *range(0, len(turns), 2)]))
        at = draw(st.sampled_from([0, len(turns[n]), draw(st.integers(0, len(turns[n])))]))
        gap = draw(st.sampled_from(["\n", "", " "]))
        turns[n] = turns[n][:at] + (gap if at else "") + IMAGE + gap + turns[n][at:]
    return turns


def plain_marked(turns: list[str]) -> bool:
    """Taking the markers out leaves no new one (`<<image>image>`)."""
    return not any(IMAGE in text.replace(IMAGE, "") for text in turns)


many = settings(max_examples=60, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@many
@given(turns=dialogues(WORDS).filter(plain_marked))
def test_ordinary_talk_is_the_originals(encoder, template, kind, turns):
    held(encoder, template, kind, turns)


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@many
@given(turns=dialogues(TRAPS).filter(plain_marked))
@example(turns=["Q", "A<unk>"])
@example(turns=["Q<unk>", "A", "B", "C"])
@example(turns=[f"{IMAGE}\nQ", "A</s>B", "C", "D"])
@example(turns=[f"{IMAGE}\nQ</s> x", "A"])
@example(turns=["</s>", "</s>"])
@example(turns=[f"{IMAGE}\nQ", " <|end|> \n x"])
def test_talk_full_of_format_marks_is_the_originals(encoder, template, kind, turns):
    held(encoder, template, kind, turns)


@pytest.mark.parametrize("kind", ["legacy", "modern"])
@many
@given(speech(TRAPS, 0), speech(TRAPS, 0))
def test_any_caption_is_the_originals(encoder, kind, asked, caption):
    held(encoder, "plain", kind, [asked + IMAGE, caption])


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@many
@given(turns=dialogues(TRAPS).filter(plain_marked))
def test_any_prompt_is_the_originals(encoder, template, kind, turns):
    asked = [llama_oracle.normal(text) for text in turns[:-1]]  # evaluation puts the picture in front itself
    found = encoder(template, kind)(conversation(asked))
    assert bare(found.ids, found.image_slots) == llama_oracle.question(SlowLlama(kind), template, asked)
    assert not found.weights.any()


# --- v0 ------------------------------------------------------------------------------------------------------------


def test_v0_shows_its_example_in_prompts_only(tokenizers):
    ours = Encoder(tokenizers["modern"], v0("Is tea hot?", "It is."), PATCHES, FILLER, "llava")
    found = ours(conversation(DESCRIBE))
    example = ["Is tea hot?", "It is."]
    expected = llama_oracle.question(SlowLlama("modern"), "llava_v0", [*example, *DESCRIBE])
    assert bare(found.ids, found.image_slots) == expected
    # Its training form names the system's words alone, as llava_v0's does.
    item = llama_oracle.training(SlowLlama("modern"), "llava_v0", DIALOGUE)
    taught = ours(conversation(DIALOGUE))
    assert bare(taught.ids, taught.image_slots) == item.ids
    assert np.flatnonzero(taught.weights).tolist() == item.expanded(PATCHES, FILLER).taught


@pytest.mark.parametrize("tokens", ["hf", "llava"])
def test_bare_v0_says_that_it_needs_its_example(tokenizers, tokens):
    with pytest.raises(UserError, match=r"v0.*example") as caught:
        Encoder(tokenizers["modern"], "v0", PATCHES, FILLER, tokens)
    assert "\n" not in str(caught.value)
