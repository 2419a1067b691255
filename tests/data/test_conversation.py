"""Conversations: what they may be, and their JSON."""

from __future__ import annotations

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn

texts = st.text(st.characters(exclude_categories=("Cs",)), max_size=20).filter(lambda text: IMAGE not in text)


@given(
    st.lists(st.tuples(texts, st.floats(0, 4)), min_size=1, max_size=6),
    texts,
    st.integers(0, 3),
    st.sampled_from([("", ""), ("positive", ""), ("chosen", "1")]),
)
def test_a_record_survives_json(parts, dataset, images, kind_and_pair):
    turns = tuple(
        Turn(("user", "assistant")[n % 2], (IMAGE * images if n == 0 else "") + text, weight)
        for n, (text, weight) in enumerate(parts)
    )
    conversation = Conversation(turns, tuple(range(images)), dataset, *kind_and_pair)
    assert conversation.is_open == (len(parts) % 2 == 1)
    assert Conversation.from_json(json.loads(json.dumps(conversation.to_json()))) == conversation
    record = ImageRecord("a", b"x", (conversation, conversation))
    assert ImageRecord.from_parts("a", b"x", record.conversations_json()) == record


def test_begun_answers_survive_json_and_others_are_written_as_before():
    question = Turn("user", "What?")
    begun = Conversation((question, Turn("assistant", "", prefix="A cat.")), ())
    sentence = Conversation((question, Turn("assistant", " A dog.", 0.5, prefix="A cat.", ended=False)), ())
    assert (begun.is_open, sentence.is_open) == (True, False)
    record = ImageRecord("a", b"", (begun, sentence))
    assert ImageRecord.from_parts("a", b"", record.conversations_json()) == record
    plain = Conversation((question, Turn("assistant", "A cat.")), ())
    assert ImageRecord("a", b"", (plain,)).conversations_json() == (
        '[{"turns":[{"role":"user","text":"What?","weight":1.0},{"role":"assistant","text":"A cat.","weight":1.0}],'
        '"images":[],"dataset":"","kind":""}]'
    )


BROKEN = {
    "assistant first": ([("assistant", "x")], (), "turn 0"),
    "user twice": ([("user", "x"), ("user", "x")], (), "turn 1"),
    "assistant twice": ([("user", "x"), ("assistant", "x"), ("assistant", "x")], (), "turn 2"),
    "no marker": ([("user", "x")], (0,), "0 <image> markers for 1"),
    "marker without an image": ([("user", IMAGE)], (), "1 <image> markers for 0"),
    "too many markers": ([("user", IMAGE * 2)], (0,), "2 <image> markers for 1"),
    # The encoder expands markers in user turns only: here the placeholder would stand without features.
    "marker in an answer": ([("user", "Draw a cup."), ("assistant", f"{IMAGE} Here.")], (0,), "turn 1: <image>"),
    "marker in a prefix": ([("user", IMAGE), ("assistant", "", {"prefix": IMAGE})], (0,), "turn 1: <image>"),
    "begun question": ([("user", "x", {"prefix": "y"})], (), "turn 0: .*prefix"),
    "question not ended": ([("user", "x", {"ended": False})], (), "turn 0"),
    "begun in between": ([("user", "x"), ("assistant", "", {"prefix": "y"}), ("user", "x")], (), "turn 1"),
    "not ended in between": ([("user", "x"), ("assistant", "y", {"ended": False}), ("user", "x")], (), "turn 1"),
}


@pytest.mark.parametrize(("turns", "images", "named"), BROKEN.values(), ids=BROKEN)
def test_broken_conversations_are_errors(turns, images, named):
    with pytest.raises(ValueError, match=named):
        Conversation(tuple(Turn(role, text, **dict(*more)) for role, text, *more in turns), images)
