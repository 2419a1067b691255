"""Conversations whose KV is kept: answers are those computed from the start, and only what is new is computed."""

from __future__ import annotations

import dataclasses

import pytest

from reverie_jax.data.tokenization import Tokens
from reverie_jax.eval.engine import Engine
from reverie_jax.eval.schedule import EngineShape
from reverie_jax.models.sharding import make_mesh
from reverie_jax.serve import scheduler as scheduler_module
from reverie_jax.serve.scheduler import Scheduler, Stopped
from tests.eval import decode_oracle as oracle
from tests.eval.decode_oracle import END, NEW_TOKENS, ask, png
from tests.serve.helpers import answers, longer, request

LIMIT = 300
"""Tokens of a sequence."""


class Pair:
    """A scheduler that keeps the conversations of two sessions, and one that computes all from the start."""

    def __init__(self, model=2, mesh=None):
        shape = EngineShape(sequence_length=LIMIT, questions=1, batch_size=1)
        made = Engine(oracle.ours(model), oracle.PROCESSOR, shape, mesh=mesh)
        self.keeping, self.plain = Scheduler(made, keep=2), Scheduler(made)

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.keeping.close()
        self.plain.close()

    def answer(self, asked, new):
        """Compare the answers of both, check how many tokens the first one prefilled; return the answer's tokens."""
        counter = self.keeping.metrics.prefilled_tokens._value
        before = counter.get()
        (found,), (expected,) = (answers(scheduler, [asked]) for scheduler in (self.keeping, self.plain))
        assert found.texts() == expected.texts()
        assert counter.get() - before == new
        return [int(word) for word in found.texts()[0].split()]


def first(picture, text="what is it?", session="a", **options):
    conversation = ask(text, shown=bool(picture))
    return request(oracle.PROCESSOR, picture, conversation, longest=NEW_TOKENS, session=session, **options)


def cut(asked, count):
    """The request with the first tokens of its prompt."""
    tokens = Tokens(asked.tokens.ids[:count], asked.tokens.weights[:count], asked.tokens.image_slots[:count])
    return dataclasses.replace(asked, tokens=tokens)


def missing(said):
    """How many of an answer's tokens have no KV: the last one that was chosen, unless that is the end behind them."""
    return len(said) == NEW_TOKENS


@pytest.mark.parametrize("model", [1, 2], ids=["unstacked", "stacked"])
def test_only_what_is_new_of_a_conversation_is_computed(model):
    with Pair(model) as pair:
        begun = asked = first(png(5))
        said = pair.answer(asked, len(asked.tokens))
        for turn in range(3):  # greedy and sampled
            answered = longer(asked, said)
            asked = longer(answered, [END, 20, 21, 22], temperature=0.9 * (turn % 2), seed=turn)
            said = pair.answer(asked, 4 + missing(said))
        # Retried with another seed, with another last question, and with another first answer.
        pair.answer(dataclasses.replace(asked, temperature=1.2, seed=9), 1)
        pair.answer(longer(answered, [END, 30, 31]), 2)
        pair.answer(longer(begun, [33, END, 34]), 3)
        # Back to the first prompt, to its beginning, and to another prompt about the picture.
        pair.answer(begun, 1)
        pair.answer(cut(begun, -2), 1)
        other = first(png(5), "whose is it?")
        said = pair.answer(other, len("ose is it? ASSISTANT:"))
        # More than a piece; up to the end, where a piece of 128 and one of 8 begin with tokens that are there.
        long = longer(longer(other, said), [END, *[40, 41] * 70])
        said = pair.answer(long, 141 + missing(said))
        full = cut(longer(longer(long, said), [END, *[42] * LIMIT]), LIMIT - 1)
        pair.answer(full, 127)
        pair.answer(longer(full, [43]), 8)
        # Nothing of another picture is used.
        for picture in (png(6), b"", png(5)):
            pair.answer(first(picture), len(first(picture).tokens))


def test_the_last_sessions_are_kept():
    with Pair() as pair:
        whole = len(first(png(5)).tokens)
        for session, kept in [*zip("abacbc", [0, 0, 1, 0, 0, 1], strict=True), ("", 0), ("", 0)]:
            pair.answer(first(png(5), session=session), 1 if kept else whole)
            assert len(pair.keeping._kept) <= 2
        # Several requests of a session at once.
        several = [longer(first(png(5)), [30] * count, n=2, temperature=1.0) for count in (0, 1, 0, 2)]
        both = [answers(scheduler, several) for scheduler in (pair.keeping, pair.plain)]
        assert [one.texts() for one in both[0]] == [one.texts() for one in both[1]]


@pytest.mark.parametrize("broken", ["join", "resume", "advance"])
def test_of_a_failed_request_nothing_is_kept(broken, monkeypatch):
    def fail(*args, **options):
        raise MemoryError("no room")

    with Pair() as pair:
        pair.answer(first(png(5)), len(first(png(5)).tokens))
        with monkeypatch.context() as patch:
            patch.setattr(scheduler_module, broken, fail)
            (failed,) = answers(pair.keeping, [first(png(5))])
        assert isinstance(failed.error, Stopped)
        pair.answer(first(png(5)), len(first(png(5)).tokens))


def test_turns_of_a_size_run_the_same_programs():
    programs = []
    with Pair() as pair:
        for picture in (png(5), png(6)):
            asked = first(picture)
            said = pair.answer(asked, len(asked.tokens))
            for turn in range(4):
                asked = longer(asked, [*said, END, *range(20, 22 + turn)], temperature=0.5 * turn, seed=turn)
                said = pair.answer(asked, 3 + turn + missing(said))
                run = (scheduler_module.join, scheduler_module.resume, scheduler_module.advance)
                programs.append([program._cache_size() for program in run])
    assert programs[1:] == programs[:-1]


@pytest.mark.parametrize(("mesh", "kept"), [((1, 1, 2), True), ((2, 1, 2), False)])
def test_on_a_mesh(mesh, kept):
    """Where devices divide a batch, nothing is kept: the sequences beside a request are empty."""
    with Pair(mesh=make_mesh(*mesh)) as pair:
        asked = first(png(5))
        said = pair.answer(asked, len(asked.tokens))
        for _ in range(2):
            asked = longer(asked, [*said, END, 20])
            said = pair.answer(asked, 2 + missing(said) if kept else len(asked.tokens))
