"""hf mode and the templates: against strings written out, transformers' own single pass over them, and brute force."""

from __future__ import annotations

import functools

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.templates import v0
from reverie_jax.data.tokenization import Encoder, Tokens
from tests.data import llama_oracle
from tests.data.llama_oracle import IMAGE

PATCHES = 3
IMAGE_ID = {"legacy": 32000, "modern": 32000, "phi3": 32011}
EXAMPLE = ("Is tea hot?", "It is.")
PAIRS = [
    *((name, kind) for name in ("llava-hf", "vicuna_v1", "llava_v0", "plain") for kind in ("legacy", "modern")),
    ("llava_v1", "modern"),
    ("v0", "modern"),
    ("phi3_instruct", "phi3"),
]


@pytest.fixture(scope="module")
def tokenizers(tmp_path_factory: pytest.TempPathFactory) -> dict:
    """transformers' own with the two tokens that llava-hf checkpoints add."""
    return {
        kind: AutoTokenizer.from_pretrained(
            llama_oracle.write_tokenizer(tmp_path_factory.mktemp(kind), kind, IMAGE, "<pad>")
        )
        for kind in IMAGE_ID
    }


@pytest.fixture(scope="module")
def encoder(tokenizers):
    @functools.cache
    def build(template: str, kind: str) -> Encoder:
        shown = v0(*EXAMPLE) if template == "v0" else template
        return Encoder(tokenizers[kind], shown, PATCHES, IMAGE_ID[kind])

    return build


def conversation(turns: list[str], weights: tuple[float, ...] = (), images: tuple[int, ...] = ()) -> Conversation:
    spoken = tuple(
        Turn(("user", "assistant")[n % 2], text, weights[n // 2] if n % 2 and weights else 1.0)
        for n, text in enumerate(turns)
    )
    return Conversation(spoken, images or (0,) * sum(text.count(IMAGE) for text in turns))


# --- templates ---------------------------------------------------------------------------------------------------

USERS = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
HUMANS = (
    "A chat between a curious human and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the human's questions."
)
DIALOGUE = [f"{IMAGE}\nWhat is this?", "A cat.", "Color?", "Black"]
RENDERED = {
    "llava-hf": (
        "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Color? ASSISTANT:",
        " Black</s>",
    ),
    "vicuna_v1": (
        f"{USERS} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Color? ASSISTANT:",
        " Black</s>",
    ),
    "llava_v1": (
        f"{HUMANS} USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Color? ASSISTANT:",
        " Black</s>",
    ),
    "llava_v0": (
        f"{HUMANS}###Human: <image>\nWhat is this?###Assistant: A cat.###Human: Color?###Assistant:",
        " Black###",
    ),
    "v0": (
        f"{HUMANS}###Human: Is tea hot?###Assistant: It is."
        "###Human: <image>\nWhat is this?###Assistant: A cat.###Human: Color?###Assistant:",
        " Black###",
    ),
    "phi3_instruct": (
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nWhat is this?<|end|>\n"
        "<|assistant|>\nA cat.<|end|>\n<|user|>\nColor?<|end|>\n<|assistant|>\n",
        "Black<|end|>",
    ),
}
"""The dialogue up to where its last answer begins, and the rest."""


def one_pass(tokenizer, text: str) -> list[int]:
    """As transformers' LLaVA processor does it: every marker repeated, one call."""
    return tokenizer(text.replace(IMAGE, IMAGE * PATCHES)).input_ids


@pytest.mark.parametrize(("template", "kind"), [pair for pair in PAIRS if pair[0] != "plain"])
def test_dialogue_reads_as_the_template_says(tokenizers, encoder, template, kind):
    asked, rest = RENDERED[template]
    encode = encoder(template, kind)
    assert encode(conversation(DIALOGUE)).ids.tolist() == one_pass(tokenizers[kind], asked + rest)
    assert encode(conversation(DIALOGUE[:3])).ids.tolist() == one_pass(tokenizers[kind], asked)


@pytest.mark.parametrize("kind", ["legacy", "modern"])
def test_plain_is_the_picture_and_its_caption(tokenizers, encoder, kind):
    encode = encoder("plain", kind)
    taught = encode(conversation([f"Say what this is.\n{IMAGE}", "A cat."]))
    assert taught.ids.tolist() == one_pass(tokenizers[kind], "<image>A cat.\n")
    assert encode(conversation([f"Say what this is.\n{IMAGE}"])).ids.tolist() == one_pass(tokenizers[kind], IMAGE)


@pytest.mark.parametrize("tokens", ["hf", "llava"])
def test_an_answer_stops_where_its_template_ends_it(tokenizers, tokens):
    def stops(template: str, kind: str) -> set[int]:
        return set(Encoder(tokenizers[kind], template, PATCHES, IMAGE_ID[kind], tokens).stop_ids)

    assert stops("vicuna_v1", "modern") == {2}
    assert stops("vicuna_v1", "legacy") == {2}
    assert {32000, 32007} <= stops("phi3_instruct", "phi3")
    assert not stops("phi3_instruct", "phi3") & {32001, 32006, 32010}


@pytest.mark.parametrize(
    ("template", "kind", "said", "answer"),
    [
        ("vicuna_v1", "modern", " A cat.\n</s>", "A cat."),
        ("vicuna_v1", "legacy", " Yes </s>", "Yes"),
        ("phi3_instruct", "phi3", "A cat.<|end|>", "A cat."),
        ("phi3_instruct", "phi3", "A cat.<|end|><|endoftext|>", "A cat."),
        ("llava_v0", "modern", " A cat.###Human: And?", "A cat."),
        ("v0", "modern", " A cat.\n###", "A cat."),
        ("vicuna_v1", "modern", " # One\n## Two ###\ntext</s>", "# One\n## Two ###\ntext"),
    ],
)
def test_decoding_gives_the_answer_alone(tokenizers, encoder, template, kind, said, answer):
    ids = tokenizers[kind](said, add_special_tokens=False).input_ids
    assert encoder(template, kind).decode(ids) == answer


# --- anything that is said ---------------------------------------------------------------------------------------

WORDS = [
    *("a", "Is", "cup", "Black", "image?", "it's", "12", "(red)", "Yes,", "."),
    *(" ", "  ", "    ", "\n", "\n\n", "\t", " \n ", "\r\n"),
    *("é", "e\u0301", "猫", "図。", "🍵", "👩‍👩‍👧", "العربية", "\u00a0", "\u3000", "\u200b", "<0x0A>", "▁"),
    *("USER: ", " ASSISTANT: ", "ASSISTANT:", "Human: ", "###", "### ", "#", "</s>", "<s>", "<unk>"),
    *("<|", "|>", "<|end|>", "<|user|>\n", "<|assistant|>\n", "<|endoftext|>", "<pad>", "http://x.y/?q=1", "  - item"),
]


def speech(smallest: int = 1) -> st.SearchStrategy[str]:
    said = st.lists(st.sampled_from(WORDS), min_size=smallest, max_size=8).map("".join)
    free = st.text(st.characters(exclude_categories=("Cs",)), min_size=smallest, max_size=12)
    return (said | free).filter(lambda text: IMAGE not in text)


@st.composite
def dialogues(draw: st.DrawFn) -> list[str]:
    """One to four exchanges; up to two pictures shown anywhere in the questions."""
    rounds = draw(st.integers(1, 4))
    turns = draw(st.lists(speech(0), min_size=2 * rounds, max_size=2 * rounds))
    for _ in range(draw(st.sampled_from([0, 1, 1, 1, 2]))):
        n = draw(st.sampled_from([0, 0, *range(0, len(turns), 2)]))
        turns[n] = draw(st.sampled_from([f"{IMAGE}\n{turns[n]}", turns[n] + IMAGE, f"{turns[n]} {IMAGE} so"]))
    return turns


many = settings(max_examples=50, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
ENDS = {"llava_v0": "###", "v0": "###", "plain": "\n", "phi3_instruct": "<|end|>"}


def rendered(template: str, turns: list[str]) -> str:
    """From section 3.3, once more: roles and separators, an open dialogue up to where its answer begins."""
    if template == "plain":
        said = [IMAGE * text.count(IMAGE) if n % 2 == 0 else f"{text}\n" for n, text in enumerate(turns)]
        return "".join(said)
    if template == "phi3_instruct":
        text = "<|system|>\nYou are a helpful AI assistant.<|end|>"
        user, assistant, prefix = "\n<|user|>\n{}<|end|>", "\n<|assistant|>\n", ""
    elif template in ("llava_v0", "v0"):
        text = f"{HUMANS}###"
        user, assistant, prefix = "Human: {}###", "Assistant:", " "
        if template == "v0":
            text += "Human: Is tea hot?###Assistant: It is.###"
    else:
        text = {"llava-hf": "", "vicuna_v1": f"{USERS} ", "llava_v1": f"{HUMANS} "}[template]
        user, assistant, prefix = "USER: {} ", "ASSISTANT:", " "
    for n, words in enumerate(turns):
        text += user.replace("{}", words) + assistant if n % 2 == 0 else f"{prefix}{words}{ENDS.get(template, '</s>')}"
    return text


def bare(text: str) -> str:
    """Without white space; sentencepiece writes a space as ▁."""
    return "".join(text.replace("▁", " ").split())


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@many
@given(turns=dialogues(), open=st.booleans())
def test_ids_are_those_of_transformers_single_pass(tokenizers, encoder, template, kind, turns, open):
    turns = turns[: len(turns) - open]
    found = encoder(template, kind)(conversation(turns))
    assert found.ids.tolist() == one_pass(tokenizers[kind], rendered(template, turns))
    assert len(found.ids) == len(found.weights) == len(found.image_slots)
    shown = found.image_slots >= 0
    assert (found.ids[shown] == IMAGE_ID[kind]).all()
    assert found.image_slots[shown].tolist() == list(range(PATCHES)) * sum(text.count(IMAGE) for text in turns)
    assert not found.weights[shown].any()
    if open and len(turns) == 1:
        assert not found.weights.any()


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@many
@given(turns=dialogues())
@example(turns=["What?", " A cat.", "And?", "\n\nA dog."])
@example(turns=[f"{IMAGE}\nWhat?", "", "And?", " "])
@example(turns=[f"{IMAGE}", "</s>", "", "</s> x"])
def test_each_answer_and_its_end_carry_its_weight(tokenizers, encoder, template, kind, turns):
    weights = (0.5, 2.0, 0.25, 4.0)
    found: Tokens = encoder(template, kind)(conversation(turns, weights))
    end = ENDS.get(template, "</s>")
    for weight, answer in zip(weights, turns[1::2], strict=False):
        places = np.flatnonzero(found.weights == weight)
        assert bare(tokenizers[kind].decode(found.ids[places])) == bare(answer + end)
        assert (np.diff(places) == 1).all()
    assert set(found.weights.tolist()) <= {0.0, *weights[: len(turns) // 2]}


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@many
@given(turns=dialogues())
@example(turns=[f"{IMAGE}\nWhat?", " A cat."])
@example(turns=[f"{IMAGE}\nWhat?", "\nA cat."])
def test_an_open_dialogue_is_the_answered_ones_beginning_and_the_rest_is_taught(encoder, template, kind, turns):
    encode = encoder(template, kind)
    asked, answered = encode(conversation(turns[:-1])), encode(conversation(turns))
    assert answered.ids[: len(asked)].tolist() == asked.ids.tolist()
    assert answered.image_slots[: len(asked)].tolist() == asked.image_slots.tolist()
    assert answered.weights[: len(asked)].tolist() == asked.weights.tolist()
    assert (answered.weights[len(asked) :] == 1).all()


@pytest.mark.parametrize("kind", ["legacy", "modern", "phi3"])
def test_reference_mode_keeps_the_prompt_a_prefix_too(tokenizers, kind):
    template = "phi3_instruct" if kind == "phi3" else "vicuna_v1"
    encode = Encoder(tokenizers[kind], template, PATCHES, 0, "llava")
    answered = encode(conversation(DIALOGUE))
    for turns in (1, 3):
        asked = encode(conversation(DIALOGUE[:turns]))
        assert answered.ids[: len(asked)].tolist() == asked.ids.tolist()
        assert answered.image_slots[: len(asked)].tolist() == asked.image_slots.tolist()


def test_pictures_are_the_ones_that_the_conversation_names(tokenizers, encoder):
    found = encoder("llava-hf", "modern")(
        conversation([f"{IMAGE} or {IMAGE}?", "So.", f"And {IMAGE}?"], images=(2, 0, 1))
    )
    shown = found.image_slots[found.image_slots >= 0]
    assert shown.tolist() == [image * PATCHES + patch for image in (2, 0, 1) for patch in range(PATCHES)]
