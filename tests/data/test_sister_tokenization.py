"""Prompts, ids and labels of the sister systems against the rules of their own code (`sister_oracle`)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from reverie_jax.data.chat_template import choose_template
from reverie_jax.data.templates import TEMPLATES, find_template, to_jinja
from reverie_jax.data.tokenization import Encoder, Tokens, is_untaught, load_tokenizer
from reverie_jax.data.tree import build_tree
from reverie_jax.errors import CheckpointError
from reverie_jax.models.architectures import ARCHITECTURES
from reverie_jax.models.checkpoints.components import Component
from tests.data import llama_oracle, sister_oracle
from tests.data.fakes import (
    BEGUN,
    byte_level_tokenizer,
    check_any_cut,
    check_begun,
    conversation_of,
    read_examples,
    write_json_rows,
)
from tests.data.llama_oracle import IMAGE, TRAPS, any_text
from tests.data.sister_oracle import MUFFIN_TOKENS, PATCH

PATCHES = 3
SISTERS = [name for name, template in TEMPLATES.items() if template and template.image]
ORACLES = {
    "minigpt4": lambda turns: sister_oracle.minigpt4(turns, PATCHES),
    "mplug_owl": lambda turns: sister_oracle.mplug_owl(sister_oracle.mplug_owl_text(turns), PATCHES),
    "muffin_reference": lambda turns: sister_oracle.muffin(turns, PATCHES),
}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory):
    """The Llama tokenizer with Muffin's tokens; transformers reads folders of its time as not legacy."""
    folder = tmp_path_factory.mktemp("muffin")
    return load_tokenizer(llama_oracle.write_tokenizer(folder, "modern", *MUFFIN_TOKENS))


@pytest.fixture(scope="module")
def encoder(tokenizer):
    return functools.cache(lambda template: Encoder(tokenizer, template, PATCHES, PATCH, "llava"))


CASES = {
    "one exchange": [f"{IMAGE}\nWhat is this?", "A cat."],
    "several": [f"{IMAGE}\nWhat is this?", "A cat.", "Color?", "Black", "Sure?", "Yes, it is."],
    "reflective": [f"{IMAGE}\nIs it day?", "Yes.", "Explain why this answer is wrong: No.", "The sun shines."],
    "no image": ["Two and two?", "Four.", "And one?", "Five."],
    "image later": ["Hi.", "Hello.", f"{IMAGE}\nWhat?", "A cup."],
    "unicode": [f"{IMAGE}\n猫は何匹？ é", "二匹。🍵\u00a0Ω", "e\u0301\u3000?", "👩‍👩‍👧 x"],
    "spaces": [f"{IMAGE}\n  two  spaces ", " a  b \n", "\n x", "\ty  "],
    "hashes": ["What is # this?", "One ### two", "And ###", "###", "#", "A###"],
    "hashes behind an image": [f"{IMAGE}\nSay ### this", "### A"],
    "roles": [f"{IMAGE}\nSay AI: hello", "AI: hello\nHuman: hi", "\nHuman: AI: ", "AI: ", "AI:", "Assistant: x"],
    "roles without an image": ["AI: hello\nHuman: x AI: ", "a AI: \nHuman: b AI: ", "?", "AI: "],
    "role words": [f"{IMAGE}\n### Human: a", "### Assistant: b\n### Human: c", "Human:", "\n### "],
    "ends": [f"{IMAGE}\nWhat </s> is?", "A </s> b", "</s>", "<s><unk> x</s>"],
    "unknown words": ["An <unk> word?", "It <unk> is", "<unk>", "x"],
    "wrapped": [f"{IMAGE}\n<Img>{{}}</Img> Describe.", "</Img> {}", "<Img> %s", "\\1"],
}
EMPTY = {
    "empty at the end": [f"{IMAGE}\nWhat?", ""],
    "empty in between": [f"{IMAGE}\nWhat?", "", "And?", "A cup."],
    "empty without an image": ["What?", "", "And?", ""],
    "empty questions": [IMAGE, "A cup.", "", "A jug."],
}


def check(tokens: Tokens, expected: sister_oracle.Labelled) -> None:
    ids, labels = expected
    assert tokens.ids.tolist() == ids
    assert np.flatnonzero(tokens.weights).tolist() == np.flatnonzero(labels).tolist()
    is_patch = tokens.ids == PATCH
    assert tokens.image_slots[is_patch].tolist() == list(range(is_patch.sum()))
    assert (tokens.image_slots[~is_patch] == -1).all()


@pytest.mark.parametrize(("text", "ids"), {
    "### Human: <im_start><im_patch><im_patch><im_end>\nWhat is it?\n### Assistant: A  cat.\n### ":
        "1 835 12968 29901 32002 32001 32001 32003 1724 338 372 29973 13 2277 29937 4007 22137 29901 319 29871 6635 29889 13"
        " 2277 29937 29871",
    "What? \n<im_start><im_patch><im_end>\n###": "1 1724 29973 32002 32001 32003 835",
    "\nHuman: ": "1 29871 13 29950 7889 29901 29871",
    "A </s> b###": "1 319 29871 2 29871 289 2277 29937",
    "猫。\n\n é": "1 29871 234 143 174 30267 13 13 904",
}.items())  # fmt: skip
def test_the_oracles_tokenizer_is_that_of_transformers_4_29(text, ids):
    assert sister_oracle.MUFFIN(text) == [int(id) for id in ids.split()]


@pytest.mark.parametrize("name", [*CASES, *EMPTY])
@pytest.mark.parametrize("template", ORACLES)
def test_samples_are_those_of_the_original_code(encoder, template, name):
    turns = (CASES | EMPTY)[name]
    check(encoder(template)(conversation_of(turns)), ORACLES[template](turns))


@pytest.mark.parametrize("template", ORACLES)
@settings(suppress_health_check=[HealthCheck.too_slow, HealthCheck.filter_too_much])
@given(data=st.data())
def test_any_sample_is_that_of_the_original_code(encoder, template, data):
    words = [*TRAPS, "AI: ", "\nHuman: ", "AI:", "###", "\n### ", "Describe.", "<Img>"]
    size = 2 * data.draw(st.integers(1, 3))
    turns = data.draw(st.lists(any_text(words, 0), min_size=size, max_size=size))
    turns[0] = data.draw(st.sampled_from(["", f"{IMAGE}\n"])) + turns[0]
    check(encoder(template)(conversation_of(turns)), ORACLES[template](turns))
    check_any_cut(encoder(template), turns, sum(map(len, turns)) % (1 + len(turns[-1])))


@pytest.mark.parametrize("name", ["one exchange", "several", "reflective", "no image", "role words"])
def test_a_row_of_mplug_owls_is_read_and_tokenized_as_it_is(encoder, tmp_path, name):
    text = sister_oracle.mplug_owl_text(CASES[name])
    image = {"image": ["a.jpg"]} if IMAGE in text else {}
    examples, _ = read_examples(write_json_rows(tmp_path / "a.jsonl", [{"text": text, **image}]))
    check(encoder("mplug_owl")(examples[0].conversation), sister_oracle.mplug_owl(text, PATCHES))


def prompt_of(template: str, turns: Sequence[str]) -> list[int]:
    said = sister_oracle.mplug_owl_text(turns)
    return {
        "minigpt4": lambda: sister_oracle.minigpt4(turns, PATCHES)[0],
        "minigpt4_eval": lambda: sister_oracle.minigpt4_prompt(turns, PATCHES),
        "mplug_owl": lambda: sister_oracle.mplug_owl_prompt(f"{said}\nAI: ", PATCHES),
        "mplug_owl_eval": lambda: sister_oracle.mplug_owl_prompt(
            f"{said}\nAI:".replace(sister_oracle.OWL, sister_oracle.LRV_OWL), PATCHES
        ),
        "muffin_eval": lambda: sister_oracle.muffin_prompt(*turns, PATCHES),
    }[template]()


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("template", ["minigpt4", "minigpt4_eval", "mplug_owl", "mplug_owl_eval", "muffin_eval"])
def test_prompts_are_those_of_the_original_code(encoder, template, name):
    for count in (1,) if template == "muffin_eval" else range(1, len(CASES[name]), 2):  # its code asks one question
        turns = CASES[name][:count]
        tokens = encoder(template)(conversation_of(turns))
        check(tokens, (prompt_of(template, turns), [0] * len(tokens)))


@pytest.mark.parametrize("name", [name for name in CASES if "role words" not in name])
def test_muffin_teaches_answers_and_their_ends(encoder, tokenizer, name):
    """The ids are the reference's but for a space behind the last end."""
    turns = CASES[name]
    tokens, ids = encoder("muffin")(conversation_of(turns)), sister_oracle.muffin(turns, PATCHES)[0]
    assert tokens.ids.tolist() == ids[:-1]
    said = tokenizer.decode(tokens.ids[tokens.weights > 0])
    assert "".join(said.split()) == "".join("".join(f"{answer}\n###" for answer in turns[1::2]).split())
    asked = encoder("muffin")(conversation_of(turns[:1]))
    assert tokens.ids[: len(asked)].tolist() == asked.ids.tolist()
    assert tokens.weights[len(asked)] > 0 or not turns[1]


@pytest.mark.parametrize(("name", "wrong"), [("one exchange", 8), ("no image", 13), ("several", 18), ("spaces", 13)])
def test_what_muffins_reference_teaches_beside_answers(encoder, tokenizer, name, wrong):
    """The first `###`, the assistant's role before each answer and the last space. With its tokenizer, nothing drifts."""
    conversation = conversation_of(CASES[name])
    sane, reference = (encoder(template)(conversation).weights > 0 for template in ("muffin", "muffin_reference"))
    assert not (sane & ~reference[:-1]).any()
    extra = np.flatnonzero(reference & ~np.append(sane, False))
    role = ["##", "#", "▁Ass", "istant", ":"]
    count = len(CASES[name]) // 2
    pieces = tokenizer.convert_ids_to_tokens(encoder("muffin_reference")(conversation).ids[extra].tolist())
    assert pieces == [*role[:2], *(role * count), "▁"]
    assert len(extra) == 3 + 5 * count == wrong


@pytest.mark.parametrize("template", [name for name in SISTERS if name != "muffin_reference"])
def test_tokens_carry_the_weight_of_their_answer(encoder, template):
    turns = [f"{IMAGE}\nWhat is this?", "A cat.", "Color?", "Black"]
    even = encoder(template)(conversation_of(turns))
    assert is_untaught(conversation_of(turns), even) is False
    for weights in ((0.5, 2.0), (0.0, 1.0), (1.0, 0.0)):
        tokens = encoder(template)(conversation_of(turns, weights))
        assert tokens.ids.tolist() == even.ids.tolist()
        carried = tokens.weights[even.weights > 0]
        first = np.flatnonzero(even.weights)
        cut = int(np.flatnonzero(np.diff(first) > 1)[0]) + 1  # where the second answer begins
        assert set(carried[:cut].tolist()) == {weights[0]}
        assert set(carried[cut:].tolist()) == {weights[1]}
        assert np.count_nonzero(tokens.weights) == np.count_nonzero(carried)


@pytest.mark.parametrize(("prefix", "text"), BEGUN)
@pytest.mark.parametrize("template", SISTERS)
def test_what_an_answer_begins_with_is_not_supervised(encoder, tokenizer, template, prefix, text):
    end = "</s>" if template.startswith("mplug") else "###"
    check_begun(encoder(template), tokenizer, end, f"{IMAGE}\nWhat?", prefix, text)


@pytest.mark.parametrize("template", ["minigpt4", "mplug_owl", "muffin"])
def test_conversations_share_their_beginning(encoder, template):
    talk = [f"{IMAGE}\nIs it day?", "Yes."]
    flat = [
        encoder(template)(conversation_of([*talk, *more])) for more in ((), ("Why?", "The sun."), ("Why?", "Light."))
    ]
    assert flat[1].ids[: len(flat[0])].tolist() == flat[0].ids.tolist()
    assert len(build_tree(flat).tokens) < len(flat[1]) + 10


def test_an_answer_of_more_than_160_tokens_stays_whole(encoder):
    tokens = encoder("minigpt4")(conversation_of(["What?", "cat " * 200]))
    assert np.count_nonzero(tokens.weights) > 200


def test_each_image_of_a_question_is_shown(encoder):
    for template in SISTERS:
        conversation = conversation_of([f"{IMAGE}\n{IMAGE}\nSame?", "No."], images=(1, 0))
        tokens = encoder(template)(conversation)
        slots = tokens.image_slots[tokens.image_slots >= 0].tolist()
        assert slots == [image * PATCHES + patch for image in (1, 0) for patch in range(PATCHES)]


@pytest.mark.parametrize(
    ("template", "text", "answer"),
    [
        ("minigpt4", "A cat.###Human: And?", "A cat."),
        ("minigpt4_eval", " A cat.\n### Assistant: no", "A cat."),
        ("mplug_owl", "A ### cat.</s>", "A ### cat."),
        ("muffin", " A cat.\n### ", "A cat."),
        ("muffin_eval", " Assistant: A cat.\n### Human", "A cat."),
        ("muffin_eval", " A cat.\n###", "A cat."),
    ],
)
def test_decoding_gives_the_answer_alone(encoder, template, text, answer):
    encode = encoder(template)
    assert encode.decode(encode.tokenizer(text, add_special_tokens=False).input_ids) == answer
    assert encode.stop_ids == (2,)


def test_the_template_of_a_sister_system_is_certain(tokenizer, tmp_path):
    main = Component(tmp_path, "llm", {})
    for name, architecture in ARCHITECTURES.items():
        if architecture.system != "llava":
            assert choose_template(architecture, tokenizer, main).name == architecture.template, name
    bare = byte_level_tokenizer()
    for name in ("muffin", "muffin_eval"):
        with pytest.raises(CheckpointError, match="<im_start>"):
            choose_template(ARCHITECTURES["muffin-13b"], bare, main, name=name)


def test_the_jinja_of_a_template_shows_the_image_where_it_does(tokenizer):
    content = [{"type": "image"}, {"type": "text", "text": "What?"}]
    messages = [
        {"role": "user", "content": content},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
    ]
    for template in SISTERS:
        rendered = tokenizer.apply_chat_template(
            messages, chat_template=to_jinja(find_template(template)), tokenize=False
        )
        ours, spans = Encoder(tokenizer, template, 1, PATCH).render(conversation_of([f"{IMAGE}\nWhat?", "A cat."]))
        assert rendered == ours
        assert ours[: spans[-1][1]].endswith("A cat." + (find_template(template).end or "</s>"))
