"""Tokenization as in transformers: against texts written out, its own single pass over them, and brute force."""

from __future__ import annotations

import functools
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from transformers import AutoTokenizer

import reverie_jax.scenes
from reverie_jax.data.chat_template import read_example_template
from reverie_jax.data.conversation import Conversation, Turn
from reverie_jax.data.templates import Template, v0_template
from reverie_jax.data.tokenization import Encoder
from reverie_jax.errors import UserError
from tests.data import llama_oracle
from tests.data.fakes import BEGUN, IMAGE_ID, WordTokenizer, check_begun, conversation_of
from tests.data.llama_oracle import IMAGE, dialogues

PATCHES = 3
IMAGE_IDS = {"legacy": 32000, "modern": 32000, "phi3": 32011, "bpe": 3}
PAIRS = [
    *[("llava-hf", "legacy"), ("llava-hf", "bpe"), ("vicuna_v1", "modern"), ("llava_v1", "legacy")],
    *[("llava_v0", "modern"), ("v0", "legacy"), ("plain", "modern"), ("plain", "legacy"), ("phi3_instruct", "phi3")],
    *[("llama3", "bpe"), ("chatml", "bpe"), ("mistral", "modern"), ("moe_llava", "bpe")],
]
"""Templates with the tokenizers of their models."""


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """transformers' own with the two tokens that llava-hf checkpoints add, by kind; the demo's is byte-level."""

    @functools.cache
    def load(kind: str) -> Any:
        folder = Path(reverie_jax.scenes.__path__[0]) / "base"
        if kind != "bpe":
            folder = llama_oracle.write_tokenizer(tmp_path_factory.mktemp(kind), kind, IMAGE, "<pad>")
        return AutoTokenizer.from_pretrained(folder)

    return load


@pytest.fixture(scope="module")
def encoder(tokenizer):
    @functools.cache
    def build(template: str, kind: str) -> Encoder:
        chosen = v0_template("Is tea hot?", "It is.") if template == "v0" else template
        return Encoder(tokenizer(kind), chosen, PATCHES, IMAGE_IDS[kind])

    return build


# Templates.

USERS, HUMANS = (
    f"A chat between a curious {speaker} and an artificial intelligence assistant. "
    f"The assistant gives helpful, detailed, and polite answers to the {speaker}'s questions."
    for speaker in ("user", "human")
)
ENDS = {"llava_v0": "###", "v0": "###", "plain": "\n", "phi3_instruct": "<|end|>", "mistral": " </s>"}
ENDS |= {"llama3": "<|eot_id|>", "chatml": "<|im_end|>\n"}
DIALOGUE = [f"{IMAGE}\nWhat is this?", "A cat.", "Color?", "Black"]


def render(template: str, turns: list[str]) -> str:
    """The templates once more; an open dialogue ends where its answer begins."""
    if template == "plain":
        return "".join(IMAGE * text.count(IMAGE) if n % 2 == 0 else f"{text}\n" for n, text in enumerate(turns))
    if template == "phi3_instruct":
        text = "<|system|>\nYou are a helpful AI assistant.<|end|>"
        user, assistant, prefix = "\n<|user|>\n{}<|end|>", "\n<|assistant|>\n", ""
    elif template in ("llava_v0", "v0"):
        text = f"{HUMANS}###" + "Human: Is tea hot?###Assistant: It is.###" * (template == "v0")
        user, assistant, prefix = "Human: {}###", "Assistant:", " "
    elif template == "llama3":
        text, header = "<|begin_of_text|>", "<|start_header_id|>{}<|end_header_id|>\n\n"
        text += f"{header.format('system')}{USERS}<|eot_id|>"
        user, assistant, prefix = header.format("user") + "{}<|eot_id|>", header.format("assistant"), ""
    elif template == "chatml":
        text = "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        user, assistant, prefix = "<|im_start|>user\n{}<|im_end|>\n", "<|im_start|>assistant\n", ""
    elif template == "mistral":
        text, user, assistant, prefix = "", "[INST] {} [/INST]", "", " "
    else:
        text = {"llava-hf": "", "llava_v1": f"{HUMANS} "}.get(template, f"{USERS} ")
        user, assistant, prefix = "USER: {} ", "ASSISTANT:", " "
    for n, words in enumerate(turns):
        text += user.replace("{}", words) + assistant if n % 2 == 0 else f"{prefix}{words}{ENDS.get(template, '</s>')}"
    return text


TWO = "USER: <image>\nWhat is this? ASSISTANT: A cat.</s>USER: Color? ASSISTANT: Black</s>"
SINGLE = "Human: <image>\nWhat is this?###Assistant: A cat.###Human: Color?###Assistant: Black###"
RENDERED = {
    "llava-hf": TWO,
    "vicuna_v1": f"{USERS} {TWO}",
    "llava_v1": f"{HUMANS} {TWO}",
    "llava_v0": f"{HUMANS}###{SINGLE}",
    "v0": f"{HUMANS}###Human: Is tea hot?###Assistant: It is.###{SINGLE}",
    "phi3_instruct": (
        "<|system|>\nYou are a helpful AI assistant.<|end|>\n<|user|>\n<image>\nWhat is this?<|end|>\n"
        "<|assistant|>\nA cat.<|end|>\n<|user|>\nColor?<|end|>\n<|assistant|>\nBlack<|end|>"
    ),
    "plain": "<image>A cat.\nBlack\n",
    "llama3": (
        "<|begin_of_text|><|start_header_id|>system<|end_header_id|>\n\n"
        f"{USERS}<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n<image>\nWhat is this?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nA cat.<|eot_id|><|start_header_id|>user<|end_header_id|>\n\n"
        "Color?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nBlack<|eot_id|>"
    ),
    "chatml": (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n<image>\nWhat is this?<|im_end|>\n"
        "<|im_start|>assistant\nA cat.<|im_end|>\n<|im_start|>user\nColor?<|im_end|>\n<|im_start|>assistant\n"
        "Black<|im_end|>\n"
    ),
    "mistral": "[INST] <image>\nWhat is this? [/INST] A cat. </s>[INST] Color? [/INST] Black </s>",
    "moe_llava": f"{USERS} {TWO}",
}


@pytest.mark.parametrize("template", RENDERED)
def test_a_dialogue_reads_as_the_template_says(template):
    assert render(template, DIALOGUE) == RENDERED[template]


@pytest.mark.parametrize("tokenization", ["hf", "llava"])
def test_answers_stop_at_the_templates_end(tokenizer, tokenization):
    def stops(template: str, kind: str) -> set[int]:
        return set(Encoder(tokenizer(kind), template, PATCHES, IMAGE_IDS[kind], tokenization).stop_ids)

    assert stops("vicuna_v1", "modern") == stops("vicuna_v1", "legacy") == {2}
    assert {32000, 32007} <= stops("phi3_instruct", "phi3")
    assert not stops("phi3_instruct", "phi3") & {32001, 32006, 32010}


@pytest.mark.parametrize(
    ("template", "kind", "text", "answer"),
    [
        ("vicuna_v1", "modern", " A cat.\n</s>", "A cat."),
        ("llava-hf", "legacy", " Yes </s>", "Yes"),
        ("llava-hf", "bpe", " A cup.</s>", "A cup."),
        ("phi3_instruct", "phi3", "A cat.<|end|><|endoftext|>", "A cat."),
        ("llava_v0", "modern", " A cat.###Human: And?", "A cat."),
        ("v0", "legacy", " A cat.\n###", "A cat."),
        ("vicuna_v1", "modern", " # One\n## Two ###\ntext</s>", "# One\n## Two ###\ntext"),
    ],
)
def test_decoding_gives_the_answer_alone(tokenizer, encoder, template, kind, text, answer):
    ids = tokenizer(kind)(text, add_special_tokens=False).input_ids
    assert encoder(template, kind).decode(ids) == answer


# Any text.


def one_pass(tokenizer: Any, text: str) -> list[int]:
    """As transformers' LLaVA processor does it: every marker repeated, one call."""
    return tokenizer(text.replace(IMAGE, IMAGE * PATCHES)).input_ids


def bare(text: str) -> str:
    """Without white space; sentencepiece writes a space as ▁."""
    return "".join(text.replace("▁", " ").split())


@pytest.mark.parametrize(("template", "kind"), PAIRS)
@settings(max_examples=25, suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(turns=dialogues(smallest=0))
@example(turns=DIALOGUE)
@example(turns=["What?", " A cat.", "And?", "\n\nA dog."])
@example(turns=[f"{IMAGE}\nWhat?", "\nA cat."])
@example(turns=[f"{IMAGE}\nWhat?", "", "And?", " "])
@example(turns=[f"{IMAGE}", "</s>", "", "</s> x"])
def test_ids_are_those_of_one_pass_and_answers_carry_their_weights(tokenizer, encoder, template, kind, turns):
    encode, weights = encoder(template, kind), (0.5, 2.0, 0.25, 4.0)
    answered, question = (encode(conversation_of(part, weights)) for part in (turns, turns[:-1]))
    for tokens, part in ((answered, turns), (question, turns[:-1])):
        assert tokens.ids.tolist() == one_pass(tokenizer(kind), render(template, part))
        assert len(tokens) == len(tokens.ids) == len(tokens.weights) == len(tokens.image_slots)
        is_image = tokens.image_slots >= 0
        assert (tokens.ids[is_image] == IMAGE_IDS[kind]).all()
        count = sum(text.count(IMAGE) for text in turns)
        assert tokens.image_slots[is_image].tolist() == list(range(PATCHES)) * count
        assert not tokens.weights[is_image].any()
    # An answer and its end are supervised, and nothing else.
    for weight, answer in zip(weights, turns[1::2], strict=False):
        indices = np.flatnonzero(answered.weights == weight)
        assert bare(tokenizer(kind).decode(answered.ids[indices])) == bare(answer + ENDS.get(template, "</s>"))
        assert (np.diff(indices) == 1).all()
    assert set(answered.weights.tolist()) <= {0.0, *weights[: len(turns) // 2]}
    # A question is the beginning of the answered conversation, and the rest is supervised.
    size = len(question)
    assert answered.ids[:size].tolist() == question.ids.tolist()
    assert answered.weights[:size].tolist() == question.weights.tolist()
    assert (answered.weights[size:] == weights[len(turns) // 2 - 1]).all()


@pytest.mark.parametrize(("prefix", "text"), BEGUN)
@pytest.mark.parametrize(("template", "kind"), PAIRS)
def test_what_an_answer_begins_with_is_not_supervised(tokenizer, encoder, template, kind, prefix, text):
    encode, question = encoder(template, kind), f"{IMAGE}\nWhat?"
    check_begun(encode, tokenizer(kind), ENDS.get(template, "</s>"), question, prefix, text)
    begun = encode(Conversation((Turn("user", question), Turn("assistant", "", prefix=prefix)), (0,)))
    end = ENDS.get(template, tokenizer(kind).eos_token)
    assert begun.ids.tolist() == one_pass(tokenizer(kind), render(template, [question, prefix]).removesuffix(end))
    assert not begun.weights.any()


@pytest.mark.parametrize(
    "content", [None, b'\xef\xbb\xbf{"question": "Is tea hot?", "answer": "It is."}', b"{", b"[]", b'{"question": 1}']
)
def test_the_example_of_v0_is_read_from_the_checkpoint(tmp_path, content):
    path = tmp_path / "template_example.json"
    if content is not None:
        path.write_bytes(content)
    if content is None or b"tea" in content:
        expected = None if content is None else v0_template("Is tea hot?", "It is.")
        assert read_example_template(tmp_path) == expected
    else:
        with pytest.raises(UserError, match="template_example"):
            read_example_template(tmp_path)


# A tokenizer of words.


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer()


def test_a_tokenizer_without_special_tokens_adds_none(words):
    words.bos_token_id = words.eos_token_id = None
    tokens = Encoder(words, "llava-hf", 1, IMAGE_ID)(conversation_of([f"{IMAGE}\nWhat?", "A cup."]))
    assert words.decode(tokens.ids, skip_special_tokens=False) == "USER: <image>\nWhat? ASSISTANT: A cup."
    assert words.decode(tokens.ids[tokens.weights > 0], skip_special_tokens=False) == " A cup."


def test_images_are_those_that_the_conversation_names(words):
    images = (2, 0, 1)
    shown = conversation_of([f"{IMAGE} or {IMAGE}?", "So.", f"And {IMAGE}?"], images=images)
    tokens = Encoder(words, "llava-hf", PATCHES, IMAGE_ID)(shown)
    slots = [image * PATCHES + patch for image in images for patch in range(PATCHES)]
    assert tokens.image_slots[tokens.ids == IMAGE_ID].tolist() == slots


def test_the_weight_of_a_question_has_no_effect(words):
    turns = Turn("user", "What?", 7.0), Turn("assistant", "A cup.", 0.0)
    assert not Encoder(words, "llava-hf", PATCHES, IMAGE_ID)(Conversation(turns, ())).weights.any()


@pytest.mark.parametrize(
    ("prefix", "text", "taught"),
    [
        ("", " A cat. ", ["A", " cat.", "</s>"]),
        (" A", " cat. ", [" cat.", "</s>"]),
        (" ", "A cat.", ["A", " cat.", "</s>"]),
    ],
)
def test_a_begun_answer_is_stripped_as_a_whole(words, prefix, text, taught):
    encode = Encoder(words, Template("bare", "spans", "", "", "<s>", "", stripped=("assistant",)), PATCHES, IMAGE_ID)
    tokens = encode(Conversation((Turn("user", "What?"), Turn("assistant", text, prefix=prefix)), ()))
    assert [words.words[id] for id in tokens.ids[tokens.weights > 0]] == taught


def test_unknown_placeholders_and_templates_are_errors(words):
    with pytest.raises(UserError, match="tokenization='llava'"):
        Encoder(words, "llava-hf", PATCHES, 77)(conversation_of([f"{IMAGE}\nWhat?", "A cup."]))
    with pytest.raises(UserError, match=r"'nobodys'.*llava-hf"):
        Encoder(words, "nobodys", PATCHES, IMAGE_ID)
    for tokenization in ("hf", "llava"):
        with pytest.raises(UserError, match=r"v0.*template_example\.json") as error:
            Encoder(words, "v0", PATCHES, IMAGE_ID, tokenization)
        assert "\n" not in str(error.value)
