"""Assignment of questions to batches: sequences of few shapes, each with one image and as many questions as fit."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Mapping, Sequence

from reverie_jax.data.conversation import IMAGE, Conversation
from reverie_jax.data.packing import SequenceShape
from reverie_jax.data.pipeline import ImageQuestions
from reverie_jax.data.processor import Processor
from reverie_jax.data.tree import build_tree, build_trees, unsupervised
from reverie_jax.errors import DataError

ICD_INSTRUCTION = "You see things that are confused with one another, and are unsure which of them are there."
"""Disturbing instruction before a question, for `contrast="instruction"`."""
_LENGTH_STEP = 64
"""Sequence lengths are rounded up to a multiple of this."""
_TEXT_STEP = 256
"""As `_LENGTH_STEP` for the text behind an image, where one batch holds all: padding then costs less than compiling."""
_FEW_QUESTIONS = 8
"""Questions that a sequence has room for at least, where one batch holds all; beyond, powers of two."""
_SHORT_SHARE = 0.9
"""Share of the trees that the shorter of two sequence lengths holds."""


@dataclasses.dataclass(frozen=True)
class EngineShape:
    """Limits of inference; the sizes in use fit the questions, in steps that keep compiled programs few.

    Attributes:
        sequence_length: Maximum sequence length, in tokens; an image whose questions do not fit takes several sequences.
        questions: Maximum number of questions about one image that are decoded together.
        batch_size: Sequences in a batch.
    """

    sequence_length: int = 1024
    questions: int = 32
    batch_size: int = 16


@dataclasses.dataclass(frozen=True)
class Group:
    """Batches of one shape.

    Attributes:
        shape: Of a sequence.
        batch_size: Sequences in a batch.
        images: Images, each with at most as many questions as one sequence holds.
        contrast: The shape and images of the second stream of instruction contrastive decoding: the same questions, behind
            `ICD_INSTRUCTION`.
    """

    shape: SequenceShape
    batch_size: int
    images: list[ImageQuestions]
    contrast: tuple[SequenceShape, list[ImageQuestions]] | None = None

    @property
    def batches(self) -> int:
        """Number of batches."""
        return -(-len(self.images) // self.batch_size)


@dataclasses.dataclass(frozen=True)
class Schedule:
    """Questions, assigned to batches.

    Attributes:
        groups: In the order in which they are decoded.
        duplicates: Numbers of questions that are answered by an equal question, by the number of that question.
    """

    groups: Sequence[Group]
    duplicates: Mapping[int, Sequence[int]]

    def with_duplicates(self, number: int) -> tuple[int, ...]:
        """Return the numbers of all questions that share an answer."""
        return (number, *self.duplicates.get(number, ()))

    def numbers(self) -> Iterator[list[int]]:
        """Yield the numbers of the questions that each batch answers."""
        for group in self.groups:
            for start in range(0, len(group.images), group.batch_size):
                batch = group.images[start : start + group.batch_size]
                yield [
                    same for image in batch for number, _ in image.questions for same in self.with_duplicates(number)
                ]


def plan(
    images: Sequence[ImageQuestions],
    processor: Processor,
    limit: EngineShape,
    *,
    multiple: int = 1,
    contrast: bool = False,
) -> list[Group]:
    """Distribute questions over sequences of at most two shapes: few long sequences do not make the many longer.

    The result depends on the questions and the limits alone, so that a resumed run finds the batches of the one before.

    Args:
        images: Images with their questions.
        processor: The model's.
        limit: Maximum sizes.
        multiple: Batch sizes are a multiple of this, for the mesh.
        contrast: Also plan the second stream of instruction contrastive decoding.

    Raises:
        DataError: A question does not fit a sequence.
        UserError: A question does not fit the decoder's context.
    """
    trees = [tree for image in images if image.questions for tree in _image_trees(image, processor, limit)]
    if not trees:
        return []
    if len(trees) <= limit.batch_size:
        return [_only_batch(trees, processor, limit, multiple, contrast)]
    lengths = sorted(length for length, _ in trees)
    short, long = _rounded(lengths[math.ceil(_SHORT_SHARE * len(lengths)) - 1]), _rounded(lengths[-1])
    bounds = [short, long] if short <= 0.75 * long else [long]
    groups = []
    for below, bound in zip([0, *bounds], bounds, strict=False):
        members = [image for length, image in trees if below < length <= bound]
        if not members:
            continue
        leaves = max(len(image.questions) for image in members)
        batch_size = -(-min(limit.batch_size, len(members)) // multiple) * multiple
        shape = SequenceShape(length=min(bound, limit.sequence_length), images=1, questions=leaves)
        second = _with_instruction(members, processor, leaves) if contrast else None
        groups.append(Group(shape, batch_size, members, second))
    return groups


def _only_batch(
    trees: Sequence[tuple[int, ImageQuestions]], processor: Processor, limit: EngineShape, multiple: int, contrast: bool
) -> Group:
    """Return all questions as one batch of roomy sizes, so that one more question or image compiles nothing anew."""
    members = [image for _, image in trees]
    patches = processor.encoder.patches if any(image.encoded for image in members) else 0

    longest, leaves = max(length for length, _ in trees), max(len(image.questions) for image in members)
    shape, batch_size = roomy_batch(longest, leaves, len(members), patches, limit, multiple)
    second = None
    if contrast:
        other, changed = _with_instruction(members, processor, shape.questions)
        second = dataclasses.replace(other, length=_roomy(other.length, patches)), changed
    return Group(shape, batch_size, members, second)


def roomy_batch(
    length: int, leaves: int, sequences: int, patches: int, limit: EngineShape, multiple: int = 1
) -> tuple[SequenceShape, int]:
    """Return the sizes of a batch that holds what is given, in few steps: a sequence's, and their number.

    Args:
        length: Tokens of the longest sequence.
        leaves: Questions of the sequence with most of them.
        sequences: Number of sequences.
        patches: Image tokens that a sequence begins with; 0 without an image.
        limit: Maximum sizes.
        multiple: See `plan`.
    """
    questions = min(max(_FEW_QUESTIONS, _power_of_two(leaves)), limit.questions)
    batch_size = -(-min(limit.batch_size, _power_of_two(sequences)) // multiple) * multiple
    return SequenceShape(
        length=min(_roomy(length, patches), limit.sequence_length), images=1, questions=questions
    ), batch_size


def _roomy(length: int, patches: int) -> int:
    return _rounded(patches + -(-max(1, length - patches) // _TEXT_STEP) * _TEXT_STEP)


def _power_of_two(number: int) -> int:
    return 1 << (number - 1).bit_length()


def _image_trees(image: ImageQuestions, processor: Processor, limit: EngineShape) -> list[tuple[int, ImageQuestions]]:
    """Split an image's questions into trees that fit a sequence; return the length of each, and its questions."""
    conversations = [conversation for _, conversation in image.questions]
    tokens = [unsupervised(one) for one in processor.tokenize(image.name, conversations)]
    try:
        trees = build_trees(tokens, tokens=limit.sequence_length, edges=0, branches=limit.questions)
    except ValueError as error:
        raise DataError(f"{image.name}: {error}") from None
    return [
        (len(tree), dataclasses.replace(image, questions=[image.questions[member] for member in members]))
        for members, tree in trees
    ]


def _rounded(length: int) -> int:
    return -(-length // _LENGTH_STEP) * _LENGTH_STEP


def _with_instruction(
    images: Sequence[ImageQuestions], processor: Processor, leaves: int
) -> tuple[SequenceShape, list[ImageQuestions]]:
    def disturbed(conversation: Conversation) -> Conversation:
        turns = list(conversation.turns)
        last = (len(turns) - 1) // 2 * 2  # the question; its answer may be begun
        opening = f"{IMAGE}\n" if turns[last].text.startswith(f"{IMAGE}\n") else ""
        text = f"{opening}{ICD_INSTRUCTION} {turns[last].text.removeprefix(opening)}"
        turns[last] = dataclasses.replace(turns[last], text=text)
        return dataclasses.replace(conversation, turns=tuple(turns))

    changed, longest = [], 0
    for image in images:
        questions = [(number, disturbed(conversation)) for number, conversation in image.questions]
        tokens = processor.tokenize(image.name, [conversation for _, conversation in questions])
        longest = max(longest, len(build_tree(map(unsupervised, tokens))))
        changed.append(dataclasses.replace(image, questions=questions))
    return SequenceShape(length=_rounded(longest), images=1, questions=leaves), changed


def deduplicated(images: Sequence[ImageQuestions]) -> tuple[list[ImageQuestions], dict[int, list[int]]]:
    """Return images without repeated questions, and the numbers of those by that of the first; POPE's splits share some."""
    first: dict[tuple[str, Conversation], int] = {}
    duplicates: dict[int, list[int]] = {}
    unique = []
    for image in images:
        questions = []
        for number, conversation in image.questions:
            if (original := first.setdefault((image.name, conversation), number)) == number:
                questions.append((number, conversation))
            else:
                duplicates.setdefault(original, []).append(number)
        unique.append(dataclasses.replace(image, questions=questions))
    return unique, duplicates
