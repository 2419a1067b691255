"""Conversations to tokens: which words stand where, which are taught, and where pictures go."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.errors import UserError
from tests.data.fakes import IMAGE_ID, WordTokenizer, talk

PATCHES = 4
SYSTEM = {
    "llava-hf": "",
    "vicuna_v1": "A chat between a curious user and an artificial intelligence assistant. The assistant gives helpful, "
    "detailed, and polite answers to the user's questions. ",
}


@pytest.fixture
def words() -> WordTokenizer:
    return WordTokenizer()


def encoder(words: WordTokenizer, template: str = "llava-hf") -> Encoder:
    return Encoder(words, template, PATCHES, IMAGE_ID)


def spoken(words: WordTokenizer, ids: list[int]) -> str:
    """All tokens as text, a picture's placeholders as one marker."""
    text = words.decode(ids, skip_special_tokens=False)
    return text.replace(IMAGE * PATCHES, IMAGE)


def taught(words: WordTokenizer, tokens: Tokens) -> list[tuple[str, float]]:
    """Runs of tokens of one positive weight, as text."""
    runs: list[tuple[list[int], float]] = []
    before = 0.0
    for id, weight in zip(tokens.ids.tolist(), tokens.weights.tolist(), strict=True):
        if weight > 0 and weight == before:
            runs[-1][0].append(id)
        elif weight > 0:
            runs.append(([id], weight))
        before = weight
    return [(words.decode(ids, skip_special_tokens=False), weight) for ids, weight in runs]


@pytest.mark.parametrize("template", SYSTEM)
def test_text_follows_the_template(words, template):
    tokens = encoder(words, template)(talk("Is it red?", "Yes, it is.", ("Explain why.", "It shines.")))
    assert spoken(words, tokens.ids.tolist()) == (
        f"<s>{SYSTEM[template]}USER: <image>\nIs it red? ASSISTANT: Yes, it is.</s>"
        "USER: Explain why. ASSISTANT: It shines.</s>"
    )


def test_plain_template_is_the_picture_and_its_caption(words):
    tokens = encoder(words, "plain")(talk("Is it red?", "Yes."))
    assert spoken(words, tokens.ids.tolist()) == "<s><image>Yes.\n"


@pytest.mark.parametrize("template", SYSTEM)
def test_answers_and_their_ends_are_taught_and_nothing_else(words, template):
    turns = (
        Turn("user", f"{IMAGE}\nFirst?"),
        Turn("assistant", "One two.", 0.5),
        Turn("user", "Second?", 7.0),  # a user's weight says nothing
        Turn("assistant", "Three.", 0.0),
        Turn("user", "Third?"),
        Turn("assistant", "Four five six."),
    )
    tokens = encoder(words, template)(Conversation(turns))
    assert taught(words, tokens) == [(" One two.</s>", 0.5), (" Four five six.</s>", 1.0)]


def test_open_conversation_ends_where_the_answer_would_begin(words):
    tokens = encoder(words)(Conversation((Turn("user", f"{IMAGE}\nWhat?"),)))
    assert spoken(words, tokens.ids.tolist()) == "<s>USER: <image>\nWhat? ASSISTANT:"
    assert not tokens.weights.any()


def test_open_conversation_is_a_prefix_of_the_answered_one(words):
    closed = talk("What?", "A cup.", ("Why?", "It has a handle."))
    encode = encoder(words)
    for turns in (1, 3):
        question, answered = encode(Conversation(closed.turns[:turns])), encode(closed)
        assert np.array_equal(question.ids, answered.ids[: len(question)])
        assert np.array_equal(question.image_slots, answered.image_slots[: len(question)])


def test_conversation_is_open_after_the_user():
    turns = talk("What?", "A cup.", ("Why?", "So.")).turns
    assert [Conversation(turns[:n]).open for n in (1, 2, 3, 4)] == [True, False, True, False]


def test_pictures_stand_at_their_markers(words):
    asked = f"Compare {IMAGE} with {IMAGE} now"
    conversation = Conversation(
        (Turn("user", asked), Turn("assistant", "Alike."), Turn("user", f"And {IMAGE}?")), images=(2, 0, 1)
    )
    tokens = encoder(words)(conversation)
    assert spoken(words, tokens.ids.tolist()) == f"<s>USER: {asked} ASSISTANT: Alike.</s>USER: And {IMAGE}? ASSISTANT:"
    at = tokens.ids == IMAGE_ID
    expected = [image * PATCHES + patch for image in (2, 0, 1) for patch in range(PATCHES)]
    assert tokens.image_slots[at].tolist() == expected
    assert (tokens.image_slots[~at] == -1).all()
    assert not tokens.weights[at].any()


def test_talk_without_a_picture(words):
    tokens = encoder(words)(Conversation((Turn("user", "Hello"), Turn("assistant", "Hi")), images=()))
    assert spoken(words, tokens.ids.tolist()) == "<s>USER: Hello ASSISTANT: Hi</s>"
    assert (tokens.image_slots == -1).all()


def test_tokenizer_without_special_tokens_adds_none(words):
    words.bos_token_id = words.eos_token_id = None
    tokens = encoder(words)(talk("What?", "A cup."))
    assert spoken(words, tokens.ids.tolist()) == "USER: <image>\nWhat? ASSISTANT: A cup."
    assert taught(words, tokens) == [(" A cup.", 1.0)]


def test_decoding_gives_the_stripped_answer(words):
    encode = encoder(words)
    ids = [*words.encode(" A red cup. "), 2, 2]
    assert encode.decode(ids) == "A red cup."


def test_encoding_twice_gives_the_same(words):
    encode, said = encoder(words), talk("What?", "A cup.", ("What?", "A cup."))
    first, second = encode(said), encode(said)
    assert np.array_equal(first.ids, second.ids)
    assert np.array_equal(first.weights, second.weights)
    assert len(first) == len(first.ids) == len(first.weights) == len(first.image_slots)


texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda text: IMAGE not in text)


@given(st.lists(st.tuples(texts, st.floats(0, 4)), min_size=1, max_size=6), texts, st.integers(0, 3))
def test_record_survives_json(parts, dataset, images):
    marks = IMAGE * images
    turns = tuple(
        Turn(("user", "assistant")[n % 2], (marks if n == 0 else "") + text, weight)
        for n, (text, weight) in enumerate(parts)
    )
    conversation = Conversation(turns, tuple(range(images)), dataset)
    assert Conversation.from_json(json.loads(json.dumps(conversation.to_json()))) == conversation
    record = ImageRecord("a", b"x", (conversation, conversation))
    assert ImageRecord.from_parts("a", b"x", record.talks_json()) == record


@pytest.mark.parametrize("roles", [("assistant",), ("user", "user"), ("user", "assistant", "assistant")])
def test_turns_must_alternate(roles):
    with pytest.raises(ValueError, match=f"turn {len(roles) - 1} is the {roles[-1]}'s"):
        Conversation(tuple(Turn(role, "x") for role in roles), images=())


@pytest.mark.parametrize(("text", "images"), [("no marker", (0,)), (IMAGE, ()), (IMAGE * 2, (0,)), (IMAGE, (0, 1))])
def test_markers_must_match_the_images(text, images):
    with pytest.raises(ValueError, match="markers for"):
        Conversation((Turn("user", text),), images)


def test_an_answer_shows_no_picture():
    # The encoder expands markers in users' turns only: here the placeholder would stand without features.
    with pytest.raises(ValueError, match=IMAGE):
        Conversation((Turn("user", "Draw a cup."), Turn("assistant", f"{IMAGE} Here.")))


def test_unknown_template_is_named(words):
    with pytest.raises(UserError, match=r"unknown template 'chatml'.*llava-hf"):
        encoder(words, "chatml")


@pytest.fixture(scope="module")
def bpe() -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer of a few sentences, as the shipped base has."""
    sentences = [
        "USER: Is there a cup in the image? ASSISTANT: Yes, there is a red cup on the left.",
        "USER: Explain why this answer is wrong: two ASSISTANT: There are three blue apples.",
        "USER: Describe the image. ASSISTANT: The image shows a teapot, a plate and two forks.",
    ]
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<pad>", "<s>", "</s>", IMAGE],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(sentences, trainer)
    begin = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    tokenizer.post_processor = begin
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        additional_special_tokens=[IMAGE],
        clean_up_tokenization_spaces=False,
    )


vocabulary = ["Is", "a", "cup", "cups", "image?", "Yes,", "No.", "it's", "12", "(red)", "Ünï", "🍵", "USER:", "why\n"]
utterances = st.lists(st.sampled_from(vocabulary), min_size=1, max_size=8).map(lambda ws: " ".join(ws).strip())


@given(st.lists(utterances.filter(bool), min_size=1, max_size=5))
def test_segments_are_the_tokens_of_the_whole_text(bpe, said):
    turns = tuple(
        Turn(("user", "assistant")[n % 2], f"{IMAGE}\n{text}" if n == 0 else text) for n, text in enumerate(said)
    )
    tokens = Encoder(bpe, "llava-hf", PATCHES, IMAGE_ID)(Conversation(turns))
    whole = "<s>"
    for turn in turns:
        whole += f"USER: {turn.text} ASSISTANT:" if turn.role == "user" else f" {turn.text}</s>"
    expected = bpe.encode(whole.replace(IMAGE, IMAGE * PATCHES), add_special_tokens=False)
    assert tokens.ids.tolist() == expected
    assert bpe.convert_tokens_to_ids(IMAGE) == IMAGE_ID


@given(utterances.filter(bool))
def test_taught_tokens_decode_to_the_answer(bpe, answer):
    encode = Encoder(bpe, "llava-hf", PATCHES, IMAGE_ID)
    tokens = encode(talk("What?", answer))
    assert encode.decode(tokens.ids[tokens.weights > 0].tolist()) == answer
