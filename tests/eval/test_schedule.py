"""The schedule asks every question once, in batches that fit their limits."""

from __future__ import annotations

import itertools
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.errors import DataError
from reverie_jax.eval.schedule import ICD_INSTRUCTION, EngineShape, deduplicated, plan
from tests.eval.decode_oracle import ask, behind_instruction
from tests.train import tiny

PROCESSOR = tiny.processor()
TEXTS = ["is it red?", "is it", "a", "b?", "what is there to see?", "is it red? " * 4, "why " * 15, "z" * 90]


def images_of(sketch):
    """Return images from (whether one is shown, its questions, each with what is asked behind its answer)."""
    numbers = itertools.count(3)
    return [
        ImageQuestions(
            f"p{n}",
            b"bytes" if shown else b"",
            [(next(numbers), ask(text, *(("yes", more) for more in then), shown=shown)) for text, then in asked],
        )
        for n, (shown, asked) in enumerate(sketch)
    ]


def count_nodes(conversations):
    """Return the number of tokens of the conversations' tree: each distinct beginning is one."""
    nodes = set()
    for conversation in conversations:
        tokens = PROCESSOR.encoder(conversation)
        pairs = list(zip(tokens.ids.tolist(), tokens.image_slots.tolist(), strict=True))
        nodes |= {tuple(pairs[: n + 1]) for n in range(len(pairs))}
    return len(nodes)


def conversations(image):
    return [conversation for _, conversation in image.questions]


@given(
    st.lists(
        st.tuples(
            st.booleans(),
            st.lists(st.tuples(st.sampled_from(TEXTS), st.lists(st.sampled_from(TEXTS[:5]), max_size=1)), max_size=7),
        ),
        max_size=14,
    ),
    st.tuples(st.sampled_from([64, 100, 128, 256]), st.integers(1, 5), st.integers(1, 5)),
    st.sampled_from([1, 2, 4]),
    st.booleans(),
)
def test_a_plan_asks_everything_once_and_fits(sketch, limit, multiple, contrast):
    asked, limit = images_of(sketch), EngineShape(*limit)
    longest = max((len(PROCESSOR.encoder(one)) for image in asked for one in conversations(image)), default=0)
    if longest > limit.sequence_length:
        with pytest.raises(DataError, match="p"):
            plan(asked, PROCESSOR, limit, multiple=multiple, contrast=contrast)
        return
    groups = plan(asked, PROCESSOR, limit, multiple=multiple, contrast=contrast)
    assert groups == plan(asked, PROCESSOR, limit, multiple=multiple, contrast=contrast)

    def contents(images):
        return Counter((i.name, i.encoded, number, one) for i in images for number, one in i.questions)

    assert contents(image for group in groups for image in group.images) == contents(asked)
    assert len(groups) <= 2
    assert [g.shape.length for g in groups] == sorted({g.shape.length for g in groups})
    for group in groups:
        assert group.batch_size % multiple == 0
        assert group.batch_size < limit.batch_size + multiple
        assert group.batches * group.batch_size >= len(group.images) > (group.batches - 1) * group.batch_size
        assert group.shape.length <= limit.sequence_length
        assert (group.contrast is not None) == contrast
        for image in group.images:
            assert 1 <= len(image.questions) <= group.shape.questions <= limit.questions
            assert count_nodes(conversations(image)) <= group.shape.length
        if not contrast:
            continue
        shape, others = group.contrast
        assert shape.questions == group.shape.questions
        assert [i.name for i in others] == [i.name for i in group.images]
        # Leaf by leaf the same questions: one question's scores are contrasted with its own.
        for other, image in zip(others, group.images, strict=True):
            assert other.questions == [(number, behind_instruction(one)) for number, one in image.questions]
            assert count_nodes(conversations(other)) <= shape.length


def test_equal_questions_about_one_image_are_asked_once():
    images = [
        ImageQuestions("a", b"", [(0, ask("x")), (1, ask("y")), (2, ask("x"))]),
        ImageQuestions("b", b"", [(3, ask("x"))]),
        ImageQuestions("a", b"", [(4, ask("x"))]),
    ]
    unique, duplicates = deduplicated(images)
    assert [[number for number, _ in image.questions] for image in unique] == [[0, 1], [3], []]
    assert duplicates == {0: [2, 4]}
    assert ICD_INSTRUCTION not in str(unique)
