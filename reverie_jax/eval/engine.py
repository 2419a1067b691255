"""Jitted batch inference over trees: a picture's prefix is prefilled once, and every question decodes from that one copy."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.packing import Batch, SequenceShape
from reverie_jax.data.pipeline import ImageQuestions, question_batches
from reverie_jax.data.processor import Processor
from reverie_jax.data.tree import build_tree, build_trees, unsupervised
from reverie_jax.errors import DataError, UserError
from reverie_jax.eval import decode
from reverie_jax.eval.decode import Decoding
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.sharding import batch_sharding, feed, local_rows, make_mesh, mesh_of, place

DISTURBING = "You see things that are confused with one another, and are unsure which of them are there."
"""What stands before a question in the stream that `against="instruction"` contrasts with."""
_STEP = 64
"""Rows are as long as a multiple of this."""
_MOST = 0.9
"""Share of the trees that the shorter of two row lengths is to hold."""
SUFFIX_BYTES = 4 << 30
"""Of the KV of all leaves' own tokens, on the devices of one row: batches are so small that they fit."""


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """Limits of inference; the sizes in use fit the questions, in steps that keep compiled programs few.

    Attributes:
        sequence_length: longest sequence, in tokens; a picture's questions that do not fit one row take several.
        questions: most questions that decode together from one row.
        batch_size: sequences in a batch.
    """

    sequence_length: int = 1024
    questions: int = 32
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """Pictures, each with as many questions as one row holds, that go into batches of one shape.

    Attributes:
        disturbed: the same pictures and questions behind `DISTURBING`, and the shape of their rows.
    """

    shape: SequenceShape
    rows: int
    pictures: list[ImageQuestions]
    disturbed: tuple[SequenceShape, list[ImageQuestions]] | None = None

    @property
    def batches(self) -> int:
        return -(-len(self.pictures) // self.rows)


@dataclasses.dataclass(frozen=True)
class Work:
    """Questions, shared out over batches.

    Attributes:
        groups: in the order in which they are asked.
        same: numbers that share the answer of another, by that one's.
    """

    groups: Sequence[Group]
    same: Mapping[int, Sequence[int]]

    def numbers(self) -> Iterator[list[int]]:
        """The questions that each batch answers."""
        for group in self.groups:
            for start in range(0, len(group.pictures), group.rows):
                here = group.pictures[start : start + group.rows]
                asked = [number for picture in here for number, _ in picture.questions]
                yield [twin for number in asked for twin in (number, *self.same.get(number, ()))]


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a model says.

    Attributes:
        tracked: log-probabilities of `Decoding.track` as its first token.
    """

    text: str
    tracked: tuple[float, ...] = ()


def plan(
    pictures: Sequence[ImageQuestions],
    processor: Processor,
    limit: EngineShape,
    *,
    spread: int = 1,
    disturb: bool = False,
) -> list[Group]:
    """Shares questions out over rows, and rows over at most two shapes: few long rows do not make the many longer.

    It depends on the questions and the limits alone, so that a run that goes on finds the batches of the one before.

    Args:
        spread: a batch's rows are a multiple of it, for the mesh.

    Raises:
        DataError: a question does not fit a row, or (UserError) the decoder's context.
    """
    sheets: list[tuple[int, int, ImageQuestions]] = []
    for picture in pictures:
        if not picture.questions:
            continue
        talks = [talk for _, talk in picture.questions]
        tokens = [unsupervised(one) for one in processor.tokens(picture.name, talks)]
        try:
            grown = build_trees(tokens, tokens=limit.sequence_length, edges=0, branches=limit.questions)
        except ValueError as error:
            raise DataError(f"{picture.name}: {error}") from None
        for members, tree in grown:
            part = dataclasses.replace(picture, questions=[picture.questions[member] for member in members])
            sheets.append((len(tree), len(members), part))
    if not sheets:
        return []
    lengths = sorted(length for length, _, _ in sheets)
    short = _rounded(lengths[math.ceil(_MOST * len(lengths)) - 1])
    bounds = [short, _rounded(lengths[-1])] if short <= 0.75 * _rounded(lengths[-1]) else [_rounded(lengths[-1])]
    groups = []
    for below, bound in zip([0, *bounds], bounds, strict=False):
        here = [(leaves, picture) for length, leaves, picture in sheets if below < length <= bound]
        if not here:
            continue
        leaves = max(leaves for leaves, _ in here)
        asked = [picture for _, picture in here]
        rows = min(limit.batch_size, len(asked))
        shape = SequenceShape(length=min(bound, limit.sequence_length), images=1, questions=leaves)
        other = _disturbed(asked, processor, leaves) if disturb else None
        groups.append(Group(shape, -(-rows // spread) * spread, asked, other))
    return groups


def _rounded(length: int) -> int:
    return -(-length // _STEP) * _STEP


def _disturbed(
    pictures: Sequence[ImageQuestions], processor: Processor, leaves: int
) -> tuple[SequenceShape, list[ImageQuestions]]:
    def behind(talk: Conversation) -> Conversation:
        *before, last = talk.turns
        opening = f"{IMAGE}\n" if last.text.startswith(f"{IMAGE}\n") else ""
        text = f"{opening}{DISTURBING} {last.text.removeprefix(opening)}"
        return dataclasses.replace(talk, turns=(*before, dataclasses.replace(last, text=text)))

    others, longest = [], 0
    for picture in pictures:
        asked = [(number, behind(talk)) for number, talk in picture.questions]
        found = processor.tokens(picture.name, [talk for _, talk in asked])
        longest = max(longest, len(build_tree(map(unsupervised, found))))
        others.append(dataclasses.replace(picture, questions=asked))
    return SequenceShape(length=_rounded(longest), images=1, questions=leaves), others


@functools.partial(jax.jit, static_argnames=("graph", "how", "stops"))
def _decode(
    graph: Any, state: Any, batch: Batch, other: Batch | None, *, how: Decoding, stops: tuple[int, ...]
) -> tuple[Array, Array]:
    # At module level: engines of models of one architecture share the compiled program.
    return decode.generate(nnx.merge(graph, state), batch, how, stops, other)


class Engine:
    """Answers questions about pictures with one model.

    Several processes (`jax.distributed`) call it alike; each decodes the pictures of its own rows, and all get all answers.

    Args:
        model: with or without adapters; read, never changed.
        processor: the model's own, as `load_model` gave it.
        mesh: devices; rows are spread over them. Those that the model is on by default, or one.
    """

    def __init__(
        self,
        model: VisionLanguageModel,
        processor: Processor,
        shape: EngineShape | None = None,
        *,
        mesh: Mesh | None = None,
    ):
        self.processor, self.encoder, self.shape = processor, processor.encoder, shape or EngineShape()
        self.graph, state = nnx.split(model)
        self.mesh = mesh or mesh_of(state) or make_mesh()
        self.state = place(state, self.mesh)
        text = model.config.text
        self.dtype = jnp.dtype(model.compute_dtype).name
        self._token_bytes = 2 * text.layers * text.kv_heads * text.head_dim * jnp.dtype(model.compute_dtype).itemsize
        if not self.encoder.stop_ids:
            raise ValueError("the tokenizer has no end-of-sequence token: answers would never stop")

    def answer(
        self,
        pictures: Sequence[ImageQuestions],
        *,
        max_new_tokens: int,
        progress: Callable[[int], None] = lambda answered: None,
    ) -> dict[int, str]:
        """Each question's greedy answer, by the question's number, in the order of the questions.

        Args:
            new_tokens: longest answer, in tokens.
            progress: called with the number of answers that a batch brought.

        Raises: as `stream`.
        """
        answers: dict[int, str] = {}
        how = Decoding(max_new_tokens)
        for found in self.stream(self.prepare(pictures, how), how):
            answers |= {number: answer.text for number, answer in found.items()}
            progress(len(found))
        return {number: answers[number] for picture in pictures for number, _ in picture.questions}

    def prepare(self, pictures: Sequence[ImageQuestions], how: Decoding, *, usual: int | None = None) -> Work:
        """Shares questions out over batches, in an order that the questions and the limits alone fix.

        Args:
            usual: see `stream`.

        Raises:
            ValueError: two questions carry one number.
            DataError: a question is too long for a row.
        """
        wanted = [number for picture in pictures for number, _ in picture.questions]
        if len(set(wanted)) != len(wanted):
            raise ValueError("two questions carry the same number; answers could not be told apart")
        # A question that is drawn for twice may have two answers.
        once, same = (pictures, {}) if how.temperature else _once(pictures)
        spread, length = self._spread, min(usual or how.max_new_tokens, how.max_new_tokens)
        leaves = min(self.shape.questions, self._room(how.max_new_tokens, how))
        rows = min(self.shape.batch_size, spread * max(1, self._room(length, how) // leaves))
        limit = dataclasses.replace(self.shape, questions=leaves, batch_size=rows)
        return Work(plan(once, self.processor, limit, spread=spread, disturb=how.contrast == "instruction"), same)

    @property
    def _spread(self) -> int:
        return self.mesh.shape["data"] * self.mesh.shape["fsdp"]

    def _room(self, max_new_tokens: int, how: Decoding) -> int:
        """How many leaves' answers of that length are decoded together on the devices of one row."""
        streams = how.beams + bool(how.contrast)
        return max(1, SUFFIX_BYTES // (self._token_bytes * max_new_tokens * streams))

    def stream(
        self, work: Work, how: Decoding, *, usual: int | None = None, skip: int = 0
    ) -> Iterator[dict[int, Answer]]:
        """Answers by the questions' numbers, a batch at a time, in the order of `work.numbers()`.

        Args:
            usual: tokens that most answers need; longer ones are decoded a second time, with room for `how.new_tokens`.
            skip: batches that are not asked again.

        Raises:
            BrokenImage: a picture cannot be read.
        """
        for group in work.groups:
            skipped, skip = min(skip, group.batches), max(0, skip - group.batches)
            # Closed by hand: a prefetching iterator left to the collector complains when the interpreter ends.
            with jax.set_mesh(self.mesh), contextlib.ExitStack() as stack:
                for batch, other in self._batches(group, skipped, stack):
                    yield {
                        twin: answer
                        for number, answer in self._answers(batch, other, how, usual).items()
                        for twin in (number, *work.same.get(number, ()))
                    }

    def _batches(self, group: Group, skip: int, stack: contextlib.ExitStack) -> Iterator[tuple[Batch, Batch | None]]:
        """A group's batches on the devices, from number `skip` on."""

        # Left last, after the batches that it works for.
        pool = stack.enter_context(ThreadPoolExecutor(os.cpu_count() or 1))

        def of(shape: SequenceShape, pictures: list[ImageQuestions]) -> Iterator[Batch]:
            rest = pictures[skip * group.rows :]
            if not rest:
                return
            local = local_rows(self.mesh, group.rows)
            made = iter(question_batches(rest, self.processor, shape, rows=group.rows, local=local, pool=pool))
            stack.enter_context(contextlib.closing(made))
            for batch in made:
                yield feed(batch, self.mesh, group.rows)

        batches = of(group.shape, group.pictures)
        if group.disturbed is None:
            for batch in batches:
                yield batch, None
        else:
            yield from zip(batches, of(*group.disturbed), strict=True)

    def _answers(self, batch: Batch, other: Batch | None, how: Decoding, usual: int | None) -> dict[int, Answer]:
        end, numbers = self.encoder.stop_ids[0], _whole(batch.questions)
        if usual is not None and usual < how.max_new_tokens and how.beams == 1:
            ids, tracked = self._run(batch, other, dataclasses.replace(how, max_new_tokens=usual))
            if (long := (ids[..., -1] != end) & (numbers >= 0)).any():
                full = self._in_parts(batch, other, how)
                ids = np.concatenate(
                    [ids, np.full((*ids.shape[:2], how.max_new_tokens - usual), end, ids.dtype)], axis=2
                )
                ids[long] = full[long]
        else:
            ids, tracked = self._run(batch, other, how)
        found = {}
        for b, q in np.argwhere(numbers >= 0):
            tokens = ids[b, q].tolist()
            text = self.encoder.decode(tokens[: tokens.index(end)] if end in tokens else tokens)
            found[int(numbers[b, q])] = Answer(text, tuple(tracked[b, q].tolist()))
        return found

    def _in_parts(self, batch: Batch, other: Batch | None, how: Decoding) -> Int[np.ndarray, "B Q T"]:
        """Rows with long answers, as many together as their KV has room."""
        rows, leaves = batch.leaves.shape
        part = min(rows, self._spread * max(1, self._room(how.max_new_tokens, how) // leaves))
        while rows % part:
            part -= self._spread

        def cut(whole: Batch | None, start: int) -> Batch | None:
            return None if whole is None else Batch(*(field[start : start + part] for field in whole))

        if part == rows:
            return self._run(batch, other, how)[0]
        local = batch_sharding(self.mesh)
        parts = []
        for start in range(0, rows, part):
            here, there = (
                None if x is None else jax.device_put(x, local) for x in (cut(batch, start), cut(other, start))
            )
            assert here is not None
            parts.append(self._run(here, there, how)[0])
        return np.concatenate(parts)

    def _run(
        self, batch: Batch, other: Batch | None, how: Decoding
    ) -> tuple[Int[np.ndarray, "B Q T"], Float[np.ndarray, "B Q N"]]:
        ids, tracked = _decode(self.graph, self.state, batch, other, how=how, stops=self.encoder.stop_ids)
        return _whole(ids), _whole(tracked)

    def first_token(self, talk: Conversation, answer: str) -> int:
        """The token that an answer to an open conversation begins with."""
        closed = dataclasses.replace(talk, turns=(*talk.turns, Turn("assistant", answer)))
        before, after = self.encoder(talk).ids, self.encoder(closed).ids
        return int(after[len(before)])


def _whole(x: Any) -> np.ndarray:
    """An array over all processes, on every host."""
    if jax.process_count() == 1:
        return np.array(x)
    return np.array(multihost_utils.process_allgather(x, tiled=True))


def _once(pictures: Sequence[ImageQuestions]) -> tuple[list[ImageQuestions], dict[int, list[int]]]:
    """Pictures without questions that stand there already, and the numbers that share another's answer.

    POPE's splits share their positives, for one.
    """
    first: dict[tuple[str, Conversation], int] = {}
    same: dict[int, list[int]] = {}
    kept = []
    for picture in pictures:
        asked = []
        for number, talk in picture.questions:
            if (original := first.setdefault((picture.name, talk), number)) == number:
                asked.append((number, talk))
            else:
                same.setdefault(original, []).append(number)
        kept.append(dataclasses.replace(picture, questions=asked))
    return kept, same


def generate(
    model: VisionLanguageModel,
    processor: Processor,
    conversations: Sequence[ImageRecord],
    max_new_tokens: int = 64,
    *,
    mesh: Mesh | None = None,
) -> list[str]:
    """Greedy answers to open conversations, each picture encoded and prefilled once.

    Args:
        conversations: records; `ask` makes them.
        max_new_tokens: longest answer, in tokens.

    Returns:
        One answer a conversation, in the records' order.

    Raises:
        UserError: a conversation is not open, or does not fit the decoder's context.
        BrokenImage: a picture cannot be read.
    """
    pictures, number = [], 0
    for index, record in enumerate(conversations):
        if closed := [n for n, talk in enumerate(record.conversations) if not talk.open]:
            raise UserError(
                f"record {record.id}: conversation {closed[0]} ends with an answer; there is nothing to say"
            )
        processor.tokens(record.id, record.conversations, max_new_tokens)
        questions = [(number + n, talk) for n, talk in enumerate(record.conversations)]
        number += len(questions)
        # Two records may share a name and show different pictures.
        pictures.append(ImageQuestions(f"{record.id} ({index})", record.image, questions))
    # Long enough for any one conversation; a record's tree takes several rows where it is longer.
    shape = EngineShape(sequence_length=max(2048, processor.context), batch_size=min(8, max(1, len(pictures))))
    engine = Engine(model, processor, shape, mesh=mesh)
    answers = engine.answer(pictures, max_new_tokens=max_new_tokens)
    return [answers[n] for n in range(number)]
