"""What is marked between two answers."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reverie_jax.chat.difference import mark_differences


@pytest.mark.parametrize(
    ("first", "second", "marked"),
    [
        ("A red cup.", "A red cup.", ([], [])),
        ("A red cup.", "A blue cup.", ([" red"], [" blue"])),
        ("A cup.", "A cup. And a dog.", ([], [" And a dog."])),
        ("A  cup", "A cup", ([], [])),
        ("", "A cup", ([], ["A cup"])),
    ],
)
def test_words_that_the_other_lacks(first, second, marked):
    found = mark_differences(first, second)
    assert tuple([text for text, differs in side if differs] for side in found) == marked


texts = st.text(st.sampled_from("ab \n.é"), max_size=30)


@given(texts, texts)
def test_nothing_is_lost_and_what_is_not_marked_is_common(first, second):
    sides = mark_differences(first, second)
    assert ["".join(text for text, _ in side) for side in sides] == [first, second]
    common = [" ".join("".join(text for text, differs in side if not differs).split()) for side in sides]
    assert common[0] == common[1]
