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


BROKEN = {
    "assistant first": ([("assistant", "x")], (), "turn 0"),
    "user twice": ([("user", "x"), ("user", "x")], (), "turn 1"),
    "assistant twice": ([("user", "x"), ("assistant", "x"), ("assistant", "x")], (), "turn 2"),
    "no marker": ([("user", "x")], (0,), "0 <image> markers for 1"),
    "marker without an image": ([("user", IMAGE)], (), "1 <image> markers for 0"),
    "too many markers": ([("user", IMAGE * 2)], (0,), "2 <image> markers for 1"),
    # The encoder expands markers in user turns only: here the placeholder would stand without features.
    "marker in an answer": ([("user", "Draw a cup."), ("assistant", f"{IMAGE} Here.")], (0,), "turn 1: <image>"),
}


@pytest.mark.parametrize(("turns", "images", "named"), BROKEN.values(), ids=BROKEN)
def test_broken_conversations_are_errors(turns, images, named):
    with pytest.raises(ValueError, match=named):
        Conversation(tuple(Turn(role, text) for role, text in turns), images)
