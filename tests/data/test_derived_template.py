"""Templates derived from a checkpoint's Jinja: ids are those of transformers' processor, masks brute force on its text."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image
from transformers import AutoTokenizer, LlavaProcessor

from reverie_jax.data.derived_template import derive_template
from reverie_jax.data.templates import CHECKPOINT, TEMPLATES, Template, to_jinja
from reverie_jax.data.tokenization import Encoder
from tests.data import llama_oracle
from tests.data.fakes import byte_level_tokenizer, conversation_of
from tests.data.llama_oracle import IMAGE, any_text
from tests.models import makers

SPECIAL = ("<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|user|>")
SPECIAL += ("<|assistant|>", "<|endoftext|>", IMAGE, "<pad>")
PARTS = "{% for c in m['content'] if c['type'] == 'image' %}{{ '<image>\\n' }}{% endfor %}"
PARTS += "{% for c in m['content'] if c['type'] == 'text' %}{{ c['text'] }}{% endfor %}"
BEFORE_TEXT = PARTS.replace("'<image>\\n'", "'<image>'").replace("c['text']", "'\\n' + c['text']")


def loop(turn: str, ask: str = "", system: str = "") -> str:
    asked = "{% if add_generation_prompt %}{{ '" + ask + "' }}{% endif %}"
    return system + "{% for m in messages %}" + turn + "{% endfor %}" + asked


HEADER = "'<|start_header_id|>' + m['role'] + '<|end_header_id|>\\n\\n'"
# The prompts of published checkpoints, and what ends an answer.
FAMILIES = {
    "Llama-3": (
        loop(
            "{% set text = " + HEADER + " + m['content'] | trim + '<|eot_id|>' %}"
            "{{ bos_token + text if loop.first else text }}",
            "<|start_header_id|>assistant<|end_header_id|>\\n\\n",
        ),
        "<|eot_id|>",
    ),
    "ChatML": (
        loop(
            "{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>\\n' }}",
            "<|im_start|>assistant\\n",
            "{{ '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}",
        ),
        "<|im_end|>",
    ),
    "Phi-3": (
        "{{ bos_token }}"
        + loop("{{ '<|' + m['role'] + '|>\\n' + m['content'] + '<|end|>\\n' }}", "<|assistant|>\\n")
        + "{% if not add_generation_prompt %}{{ eos_token }}{% endif %}",
        "<|end|>",
    ),
    "Zephyr": (
        loop("{{ '<|' + m['role'] + '|>\\n' }}" + PARTS + "{{ eos_token + '\\n' }}", "<|assistant|>\\n"),
        "</s>",
    ),
    "[INST]": (
        "{{ bos_token }}"
        + loop(
            "{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
            "{% else %}{{ ' ' + m['content'] | trim + ' ' + eos_token }}{% endif %}"
        ),
        "</s>",
    ),
    "llava-interleave": (
        loop("{{ '<|im_start|>' + m['role'] + ' ' }}" + BEFORE_TEXT + "{{ '<|im_end|>' }}", "<|im_start|>assistant\\n"),
        "<|im_end|>",
    ),
    "words": (loop("{{ m['role'] + ': ' }}" + PARTS + "{{ '###' }}", "assistant: "), "###"),
}
BY_TEXT = {"Llama-3", "ChatML", "Phi-3", "[INST]"}  # a language model's, which takes no parts
KINDS = ("words", "bytes", "bytes with BOS", "BOS begins a turn", "modern", "legacy")


@functools.cache
def small(kind: str) -> Any:
    if kind == "words":
        return makers.tokenizer(*SPECIAL)
    tokenizer = byte_level_tokenizer(*SPECIAL, "<|end|>", bos="<s>" if kind == "bytes with BOS" else None)
    if kind == "BOS begins a turn":  # SmolLM2's, which adds none
        tokenizer.bos_token = "<|im_start|>"
    return tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    @functools.cache
    def load(kind: str) -> Any:
        if kind not in ("modern", "legacy"):
            return small(kind)
        folder = llama_oracle.write_tokenizer(tmp_path_factory.mktemp(kind), kind, *SPECIAL, "<|end|>")
        return AutoTokenizer.from_pretrained(folder)

    return load


def messages(turns: Sequence[str], parts: bool) -> list[dict[str, Any]]:
    made: list[dict[str, Any]] = []
    for n, text in enumerate(turns):
        question = text.removeprefix(f"{IMAGE}\n")
        shown = [{"type": "image"}] if question != text else []
        content = [*shown, {"type": "text", "text": question}] if parts else text
        made.append({"role": ("user", "assistant")[n % 2], "content": content})
    return made


def theirs(tokenizer: Any, family: str, turns: Sequence[str]) -> tuple[str, list[int], list[tuple[int, int]]]:
    """What transformers renders, its ids and their characters; a processor adds no BOS to a text that begins with one."""
    jinja, given = FAMILIES[family][0], messages(turns, family not in BY_TEXT)
    text = tokenizer.apply_chat_template(
        given, chat_template=jinja, tokenize=False, add_generation_prompt=len(turns) % 2 == 1
    )
    begins = bool(tokenizer.bos_token) and text.startswith(tokenizer.bos_token)
    found = tokenizer(text, add_special_tokens=not begins, return_offsets_mapping=True)
    return text, found["input_ids"], found["offset_mapping"]


def taught(tokenizer: Any, family: str, turns: list[str]) -> set[int]:
    """Tokens of the last answer and of what ends it: from where the text is that of the same answer's beginning."""
    text, _, offsets = theirs(tokenizer, family, turns)
    prompt = theirs(tokenizer, family, turns[:-1])[0]
    if not text.startswith(prompt):  # llava-interleave writes a space before the line break, where it does not ask
        prompt = prompt.removesuffix("\n") + " \n"
    assert text.startswith(prompt)
    stop = text.rindex(FAMILIES[family][1]) + len(FAMILIES[family][1])
    return {n for n, (first, last) in enumerate(offsets) if len(prompt) <= first < stop and first < last}


@st.composite
def dialogues(draw: st.DrawFn) -> list[str]:
    words = [word for word in llama_oracle.WORDS if "#" not in word]
    turns = draw(st.integers(2, 7).flatmap(lambda n: st.lists(any_text(words), min_size=n, max_size=n)))
    assume(not any(mark in text for mark in ("<|", "##", "<s>", "</s>") for text in turns))
    return [f"{IMAGE}\n{turns[0]}", *turns[1:]] if draw(st.booleans()) else turns


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("family", FAMILIES)
@settings(max_examples=20, suppress_health_check=list(HealthCheck))
@given(turns=dialogues())
@example(turns=[f"{IMAGE}\n What is this? ", " A cat.\n", "\nColor?", "Black"])
@example(turns=["Q", "A"])
def test_ids_are_the_processors_and_answers_are_taught(tokenizer, family, kind, turns):
    tokenizer = tokenizer(kind)
    if family == "Llama-3" and tokenizer.bos_token is None:
        return  # its template writes BOS
    template = derive_template(tokenizer, FAMILIES[family][0])
    assert template.name == CHECKPOINT
    encoder = Encoder(tokenizer, template, 1, tokenizer.convert_tokens_to_ids(IMAGE))
    for size in range(1, len(turns) + 1):
        conversation = conversation_of(turns[:size], weights=[2.0**n for n in range(size // 2)])
        ours, (_, ids, _) = encoder(conversation), theirs(tokenizer, family, turns[:size])
        if size % 2:
            assert ours.ids.tolist() == ids
        else:  # behind the last answer's end nothing is asked or taught
            last = np.flatnonzero(ours.weights == 2.0 ** (size // 2 - 1))
            assert set(last.tolist()) == taught(tokenizer, family, turns[:size])
            assert ours.ids[: last.max() + 1].tolist() == ids[: last.max() + 1]
    end = FAMILIES[family][1]
    if end != "###":
        assert tokenizer.convert_tokens_to_ids(end) in encoder.stop_ids
    said = tokenizer(f"A bad.{end}", add_special_tokens=False)["input_ids"]
    assert encoder.decode(said) == "A bad."


@pytest.mark.parametrize("kind", KINDS[:4])
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in BY_TEXT])
def test_ids_of_a_picture_are_the_processors(tokenizer, family, kind):
    tokenizer, jinja = tokenizer(kind), FAMILIES[family][0]
    processor = LlavaProcessor(
        makers.image_processor(),
        tokenizer,
        patch_size=makers.PATCH,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=jinja,
    )
    given = messages([f"{IMAGE}\nWhat?", "A cat.", "And?"], parts=True)
    given[0]["content"][0]["image"] = Image.new("RGB", (30, 20))
    ids = processor.apply_chat_template(given, add_generation_prompt=True, tokenize=True, return_dict=True)["input_ids"]
    image = tokenizer.convert_tokens_to_ids(IMAGE)
    encoder = Encoder(tokenizer, derive_template(tokenizer, jinja), makers.PATCHES, image)
    assert (
        encoder(conversation_of([f"{IMAGE}\nWhat?", "A cat.", "And?"])).ids.tolist() == np.asarray(ids).ravel().tolist()
    )


# Templates of any texts.

PIECES = [
    "",
    "\n",
    " ",
    "USER: ",
    "</s>",
    "<|im_end|>\n",
    "<|eot_id|>",
    "###",
    "[INST] ",
    "<|user|>\n",
    "Be kind.",
    "x",
]
texts = st.lists(st.sampled_from(PIECES), max_size=3).map("".join)


@settings(max_examples=200, suppress_health_check=list(HealthCheck))
@given(st.tuples(texts, texts, texts, st.sampled_from(["", " ", "\n", "x"]), texts))
def test_any_template_is_derived_from_its_jinja(pieces):
    given = Template("given", "spans", *pieces)
    found = derive_template(small("bytes"), to_jinja(given))
    if given.end == "</s>" or not given.end.strip():  # an answer must end
        given = dataclasses.replace(given, end=None)
    assert dataclasses.replace(found, name="given", style="spans", sentence="", jinja=None) == given


DERIVED = [name for name, known in TEMPLATES.items() if known and known.style != "plain" and not known.image]


@pytest.mark.parametrize("name", DERIVED)
def test_a_known_template_is_found(name):
    tokenizer, known = small("bytes"), TEMPLATES[name]
    found = derive_template(tokenizer, to_jinja(known))
    assert dataclasses.replace(found, name=known.name, style=known.style) == known


def test_an_answer_may_be_a_text_where_a_question_is_parts():
    mixed = loop(
        "{{ '<|' + m['role'] + '|>\\n' }}{% if m['role'] == 'user' %}"
        + PARTS
        + "{% else %}{{ m['content'] }}{% endif %}"
        "{{ eos_token + '\\n' }}",
        "<|assistant|>\\n",
    )
    found, pure = (derive_template(small("bytes"), jinja) for jinja in (mixed, FAMILIES["Zephyr"][0]))
    assert dataclasses.replace(found, jinja=None) == dataclasses.replace(pure, jinja=None)


LLAVA_15 = loop("{{ m['role'].upper() + ': ' }}" + PARTS + "{{ ' ' }}", "ASSISTANT:")


def test_an_answer_that_ends_in_white_space_ends_with_the_end_of_sequence():
    """As llava-1.5-hf's own, whose weights were trained with it."""
    assert derive_template(small("words"), LLAVA_15).name == "llava-hf"
    joined = derive_template(small("words"), LLAVA_15.replace("USER: ", "").replace("ASSISTANT:", "ASSISTANT: "))
    assert (joined.name, joined.end) == (CHECKPOINT, None)


REFUSED = {
    "later turns differ": (
        loop("{{ '\\n' if loop.index0 == 4 }}{{ m['role'] }}" + PARTS + "{{ eos_token }}", "assistant"),
        "as",
    ),
    "only the last answer ends": (
        loop("{{ m['role'] }}" + PARTS + "{{ eos_token if loop.last }}", "assistant"),
        "</s>",
    ),
    "the end of the last alone": (
        loop("{{ m['role'] + '\\n\\n\\n' }}" + PARTS + "{{ eos_token if loop.last }}"),
        "</s>",
    ),
    "asked otherwise": (LLAVA_15.replace("'ASSISTANT:'", "'BOT:'"), "BOT"),
    "no newline after an image": (LLAVA_15.replace("<image>\\n", "<image>"), "newline"),
    "the image last": (loop(PARTS.split("{% endfor %}")[1] + "{% endfor %}" + PARTS + "{{ eos_token }}"), " "),
    "no image": (loop("{{ m['role'] }}{{ m['content'][-1]['text'] }}{{ eos_token }}", "assistant"), " "),
    "a turn is dropped": ("{{ messages[-1]['content'] }}", "each turn once"),
    "raises": ("{{ raise_exception('no') }}", "no"),
    "no template": ("{% for %}", " "),
    "text": ("hello", " "),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_a_template_cannot_render_is_refused(name):
    jinja, word = REFUSED[name]
    with pytest.raises(Exception, match=word):  # of any type: a template's
        derive_template(small("words"), jinja)
