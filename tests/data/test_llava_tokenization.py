"""Original LLaVA's tokenization: its published and observed ids, and an emulation on sentencepiece for all other text.

The emulation (`llama_oracle`) is held against the same observations.
"""

from __future__ import annotations

import dataclasses
import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings

from reverie_jax.data.conversation import Turn
from reverie_jax.data.templates import v0_template
from reverie_jax.data.tokenization import Encoder, Tokens, is_untaught, load_tokenizer, untaught_turns
from tests.data import llama_oracle
from tests.data.fakes import BEGUN, byte_level_tokenizer, check_any_cut, check_begun, conversation_of
from tests.data.llama_oracle import IMAGE, TRAPS, SlowLlama, any_text, dialogues

PATCHES = 3
FILLER = 0  # the original format has no image token

PAIRS = [
    *((template, kind) for template in ("vicuna_v1", "llava_v1", "llava_v0") for kind in ("legacy", "modern")),
    ("phi3_instruct", "phi3"),
]
FURTHER = [("mistral", "legacy"), ("mistral", "modern"), ("llama3", "llama3"), ("moe_llava", "moe")]
"""Templates with the tokenizers of their models."""


HEADERS = ("<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
BYTES = {
    "llama3": byte_level_tokenizer(*HEADERS, "<pad>", bos="<|begin_of_text|>", eos="<|eot_id|>", pad="<pad>"),
    "moe": byte_level_tokenizer("<|reg0|>", eos="<|endoftext|>", pad="<|reg0|>"),
}


def oracle_tokenizer(kind: str) -> llama_oracle.AnyTokenizer:
    if kind in BYTES:
        return llama_oracle.Bytes(BYTES[kind], BYTES[kind].pad_token_id)
    return SlowLlama(kind)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """transformers' own, from folders as the Llama and Phi-3 repositories have them, by kind; or byte-level ones."""
    return functools.cache(
        lambda kind: (
            BYTES[kind]
            if kind in BYTES
            else load_tokenizer(llama_oracle.write_tokenizer(tmp_path_factory.mktemp(kind), kind))
        )
    )


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return functools.cache(lambda template, kind: Encoder(tokenizer(kind), template, PATCHES, FILLER, "llava"))


def bare(tokens: Tokens) -> list[int]:
    """Ids with -200 in place of each image's tokens, which must be whole and in order."""
    ids, slots = tokens.ids, tokens.image_slots
    out = ids[slots < 0].tolist()
    starts = np.flatnonzero(slots == 0)
    for start in starts:
        assert slots[start : start + PATCHES].tolist() == list(range(PATCHES))
        assert (ids[start : start + PATCHES] == FILLER).all()
    assert (slots >= 0).sum() == PATCHES * len(starts)
    for number, start in enumerate(starts):
        out.insert(start - number * (PATCHES - 1), llama_oracle.IMAGE_ID)
    return out


def check_sample(encoder, template: str, kind: str, turns: list[str]) -> list[int]:
    """Compare a sample's ids, image slots and supervised tokens with the oracle's; return the oracle's supervised tokens."""
    tokens = encoder(template, kind)(conversation_of(turns))
    expected = llama_oracle.training(oracle_tokenizer(kind), template, turns)
    assert bare(tokens) == expected.ids
    expanded = expected.expanded(PATCHES, FILLER)
    assert tokens.ids.tolist() == expanded.ids
    assert np.flatnonzero(tokens.weights).tolist() == expanded.supervised
    return expected.supervised


# Observed samples.

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
TWO = {"legacy": [*range(47, 51), 61, 62], "modern": [*range(47, 51), 60, 61]}
SUPERVISED = {(template, kind): TWO[kind] for template in ("vicuna_v1", "llava_v1") for kind in TWO}
SUPERVISED |= {("llava_v0", kind): [33, 34, *range(46, 57), *range(62, 72)] for kind in TWO}
SUPERVISED |= {("phi3_instruct", "phi3"): [22, 23, 24, 25, 31, 32]}
LENGTH = {"legacy": 63, "modern": 62, "phi3": 33}


def numbers(text: str) -> list[int]:
    return [int(word) for word in text.split()]


@pytest.mark.parametrize("kind", ["legacy", "modern"])
@pytest.mark.parametrize("template", ["llava_v1", "vicuna_v1"])
def test_the_prompt_is_the_published_one(encoder, template, kind):
    expected = [1404 if id == 5199 and template == "vicuna_v1" else id for id in numbers(PUBLISHED)]
    assert len(expected) == 50
    assert llama_oracle.question(SlowLlama(kind), template, DESCRIBE) == expected
    assert bare(encoder(template, kind)(conversation_of(DESCRIBE))) == expected


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_a_sample_is_supervised_as_the_original_was_observed_to(encoder, template, kind):
    assert check_sample(encoder, template, kind, DIALOGUE) == SUPERVISED[template, kind]
    ids = bare(encoder(template, kind)(conversation_of(DIALOGUE)))
    assert len(ids) == (72 if template == "llava_v0" else LENGTH[kind])
    if template == "vicuna_v1":
        assert ids[42:] == numbers(f"319 1799 9047 13566 29901 319 6635 29889 2 {SECOND_ROUND[kind]}")
    if template == "phi3_instruct":
        assert ids == numbers(PHI3)


@pytest.mark.parametrize("kind", ["legacy", "modern"])
def test_a_caption_is_supervised_with_its_newline(encoder, kind):
    turns = [f"Describe it.\n{IMAGE}", "A cat."]
    check_sample(encoder, "plain", kind, turns)
    tokens = encoder("plain", kind)(conversation_of(turns))
    assert bare(tokens) == [1, -200, 319, 6635, 29889, 13]
    assert tokens.weights.tolist() == [0] * (1 + PATCHES) + [1] * 4
    further = conversation_of([*turns, "And?", "A dog."])  # original LLaVA drops what follows a caption
    assert untaught_turns(further, encoder("plain", kind)) == [3]
    assert untaught_turns(further, encoder("vicuna_v1", kind)) == []


@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_tokens_carry_the_weight_of_their_answer(encoder, template, kind):
    for weights in ((0.5, 2.0), (0.0, 1.0), (1.0, 0.0)):
        carried = encoder(template, kind)(conversation_of(DIALOGUE, weights)).weights
        if template == "llava_v0":  # the mask has drifted, but tokens still come in the order of the answers
            supervised = encoder(template, kind)(conversation_of(DIALOGUE)).weights > 0
            assert carried[supervised].tolist() == sorted(carried[supervised].tolist(), key=weights.index)
            assert set(carried[supervised].tolist()) == set(weights)
        else:
            supervised = np.asarray(SUPERVISED[template, kind]) + PATCHES - 1
            assert carried[supervised].tolist() == [weights[0]] * 4 + [weights[1]] * 2
        assert np.count_nonzero(carried) == np.count_nonzero(carried[supervised])


@pytest.mark.parametrize(
    ("template", "kind"), [*FURTHER, ("chatml", "moe"), ("chatml", "modern"), ("vicuna_v1", "moe")]
)
def test_answers_and_their_ends_are_supervised(encoder, tokenizer, template, kind):
    """By counting, or by spans where no way of counting is published for the template and such a tokenizer."""
    encode, end = encoder(template, kind), {"llama3": "<|eot_id|>", "mistral": " </s>", "chatml": "<|im_end|>"}
    for turns in (DIALOGUE, [text.replace(f"{IMAGE}\n", "") for text in DIALOGUE]):
        tokens = encode(conversation_of(turns, weights=(1.0, 2.0)))
        for weight, answer in ((1.0, "A cat."), (2.0, "Black")):
            said = tokenizer(kind).decode(tokens.ids[tokens.weights == weight])
            assert said.strip() == f"{answer}{end.get(template, tokenizer(kind).eos_token)}"
        if template == "llama3":  # its text begins with BOS, and the tokenizer adds one
            assert bare(tokens)[:3].count(tokenizer(kind).bos_token_id) == 2
        else:
            assert bare(tokens).count(tokenizer(kind).bos_token_id) == (kind == "modern" or kind == "legacy")
        assert not encode(conversation_of(turns[:3])).weights.any()


ENDS = {"llava_v0": "###", "plain": "", "phi3_instruct": "<|end|>", "llama3": "<|eot_id|>", "chatml": "<|im_end|>\n"}


@pytest.mark.parametrize(("prefix", "text"), BEGUN)
@pytest.mark.parametrize(
    ("template", "kind"), [*PAIRS, *FURTHER, ("plain", "legacy"), ("chatml", "moe"), ("chatml", "modern")]
)
def test_what_an_answer_begins_with_is_not_supervised(encoder, tokenizer, template, kind, prefix, text):
    encode, end = encoder(template, kind), ENDS.get(template, tokenizer(kind).eos_token)
    check_begun(encode, tokenizer(kind), end, f"{IMAGE}\nWhat?", prefix, text)
    asked = conversation_of([f"{IMAGE}\nWhat?", f"{prefix.strip()} It sits."])
    begun = dataclasses.replace(asked, turns=(asked.turns[0], Turn("assistant", "", prefix=prefix.strip())))
    assert not encode(begun).weights.any()
    if template in (
        "llava_v0",
        "plain",
    ):  # prompts differ from what is trained, and so does the mask of one answer of two
        return
    assert bare(encode(asked))[: len(bare(encode(begun)))] == bare(encode(begun))
    further = conversation_of([f"{IMAGE}\nWhat?", prefix + text, "And?", "A jug."])
    turns = (further.turns[0], Turn("assistant", text, prefix=prefix), *further.turns[2:])
    weights, whole = (encode(one).weights for one in (dataclasses.replace(further, turns=turns), further))
    alone = encode(dataclasses.replace(further, turns=turns[:2])).weights
    size = np.flatnonzero(alone)[0]
    assert whole[size:].tolist() == weights[size:].tolist()
    assert not weights[:size].any()


def test_moe_llavas_image_stays_where_it_is(encoder, tokenizer):
    tokens = encoder("moe_llava", "moe")(conversation_of([f"What is it?\n{IMAGE}", "A cat."]))
    ids = bare(tokens)
    assert tokenizer("moe").decode(ids[: ids.index(-200)]).endswith("USER: What is it?\n")
    assert tokenizer("moe").decode(tokens.ids[tokens.weights > 0]).strip() == "A cat.<|endoftext|>"


# Samples whose counts do not add up.

MASKED = {
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
@pytest.mark.parametrize("name", [*MASKED, *KEPT])
def test_a_count_that_does_not_add_up_masks_the_whole_sample(encoder, kind, name):
    answer = (MASKED | KEPT)[name]
    for question in (f"{IMAGE}\nWhat is this?", "What is this?"):
        samples = [[question, answer], [question, "A cat.", "And this?", answer]]
        if answer:  # an empty one runs into the next round, and the count is right again
            samples.append([question, answer, "And this?", "A cat."])
        for turns in samples:
            assert bool(check_sample(encoder, "vicuna_v1", kind, turns)) == (name in KEPT)
            asked = conversation_of(turns)
            assert is_untaught(asked, encoder("vicuna_v1", kind)(asked)) == (name in MASKED)


@pytest.mark.parametrize("answer", ["A cat.<|end|>", "a<|end|>\n<|assistant|>\nb", "<|end|>", "", "an <unk> word"])
def test_phi3_masks_too(encoder, answer):
    for turns in ([f"{IMAGE}\nWhat?", answer], ["What?", "A cat.", "And?", answer]):
        assert not check_sample(encoder, "phi3_instruct", "phi3", turns)


def test_a_sample_longer_than_the_published_length_is_not_checked(encoder):
    assert check_sample(encoder, "vicuna_v1", "modern", [f"{IMAGE}\nWhat is this?", "cat " * 2100 + "<unk>"])


# Any text.


def markers_vanish(turns: list[str]) -> bool:
    """Taking the markers out leaves no new one (`<<image>image>`)."""
    return not any(IMAGE in text.replace(IMAGE, "") for text in turns)


slow = [HealthCheck.too_slow, HealthCheck.filter_too_much]


@pytest.mark.parametrize(("template", "kind"), [*PAIRS, *FURTHER])
@settings(suppress_health_check=slow)
@given(turns=dialogues().filter(markers_vanish))
@example(turns=["Q", "A<unk>"])
@example(turns=[f"{IMAGE}\n{IMAGE}\nQ", "A"])
@example(turns=["Q<unk>", "A", "B", "C"])
@example(turns=[f"{IMAGE}\nQ", "A</s>B", "C", "D"])
@example(turns=[f"{IMAGE}\nQ</s> x", "A"])
@example(turns=["</s>", "</s>"])
@example(turns=[f"{IMAGE}\nQ", " <|end|> \n x"])
# The original prints `ROLE:` for an empty message, with neither a space nor an end token after it.
@example(turns=[f"{IMAGE}\nWhat?", ""])
@example(turns=["What?", "", "And?", "A cat."])
@example(turns=["What?", "A cat.", "", "A dog."])
def test_any_sample_and_prompt_is_the_originals(encoder, template, kind, turns):
    check_sample(encoder, template, kind, turns)
    if template != "plain":
        check_any_cut(encoder(template, kind), turns, sum(map(len, turns)) % (1 + len(turns[-1])))
    asked = [llama_oracle.normal(text) for text in turns[:-1]]  # evaluation puts the image in front itself
    if all(asked):
        tokens = encoder(template, kind)(conversation_of(asked))
        assert bare(tokens) == llama_oracle.question(oracle_tokenizer(kind), template, asked)
        assert not tokens.weights.any()


@pytest.mark.parametrize("kind", ["legacy", "modern"])
@settings(max_examples=25, suppress_health_check=slow)
@given(any_text(TRAPS, 0), any_text(TRAPS, 0))
def test_any_caption_is_the_originals(encoder, kind, question, caption):
    check_sample(encoder, "plain", kind, [question + IMAGE, caption])


def test_v0_shows_its_example_in_prompts_only(tokenizer):
    example = ["Is tea hot?", "It is."]
    encode = Encoder(tokenizer("modern"), v0_template(*example), PATCHES, FILLER, "llava")
    expected = llama_oracle.question(SlowLlama("modern"), "llava_v0", [*example, *DESCRIBE])
    assert bare(encode(conversation_of(DESCRIBE))) == expected
    # Its training form has the system message alone, as llava_v0's does.
    sample, item = encode(conversation_of(DIALOGUE)), llama_oracle.training(SlowLlama("modern"), "llava_v0", DIALOGUE)
    assert bare(sample) == item.ids
    assert np.flatnonzero(sample.weights).tolist() == item.expanded(PATCHES, FILLER).supervised
