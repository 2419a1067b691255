"""Small stand-ins: a tokenizer that needs no training, records that need no renderer, rows and tokens of any kind."""

from __future__ import annotations

import dataclasses
import io
import json
import re
import struct
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import strategies as st
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import Example, ReadLog
from reverie_jax.data.tokenization import Encoder, Tokens

IMAGE_ID = 3
STORED_IMAGE = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])


class WordTokenizer:
    """Words, each with the white space before it, as ids that depend on the word alone; special tokens as they are."""

    bos_token_id: int | None = 1
    eos_token_id: int | None = 2
    special = MappingProxyType({"<s>": 1, "</s>": 2, IMAGE: IMAGE_ID})

    def __init__(self) -> None:
        self.words = {id: word for word, id in self.special.items()}

    @property
    def eos_token(self) -> str | None:
        return None if self.eos_token_id is None else "</s>"

    def __call__(self, text: str, *, return_offsets_mapping: bool) -> dict[str, list]:
        ids = self.encode(text)
        ends = np.cumsum([len(self.words[id]) for id in ids]).tolist()
        spans = list(zip([0, *ends], ends, strict=False))
        if self.bos_token_id is not None:
            ids, spans = [self.bos_token_id, *ids], [(0, 0), *spans]
        return {"input_ids": ids, "offset_mapping": spans}

    def encode(self, text: str) -> list[int]:
        pieces = re.findall(r"<s>|</s>|<image>|\s*(?:(?!<s>|</s>|<image>)\S)+|\s+", text)
        assert "".join(pieces) == text
        ids = [self.special.get(piece) or 10 + zlib.crc32(piece.encode()) % 1_000_000 for piece in pieces]
        self.words.update(zip(ids, pieces, strict=True))
        return ids

    def decode(self, ids: Sequence[int], *, skip_special_tokens: bool) -> str:
        return "".join(self.words[i] for i in ids if not (skip_special_tokens and i in self.special.values()))


def byte_level_tokenizer(*added: str, bos: str | None = None, eos: str = "</s>", pad: str | None = None) -> Any:
    """A trained tokenizer of bytes, as Llama-3's (which adds BOS) and Qwen's; special tokens behind its 300 pieces."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer, bpe.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    text = ["What is this? A cat, and the other is a black cat.\n\nUSER: ASSISTANT: assistant\n"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bpe.train_from_iterator(text, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    bpe.add_special_tokens([*dict.fromkeys((*([bos] if bos else []), eos, *added))])
    if bos:
        special = [(bos, bpe.token_to_id(bos))]
        bpe.post_processor = processors.TemplateProcessing(single=f"{bos} $A", special_tokens=special)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token=bos, eos_token=eos, pad_token=pad)


# Images.


def saved(image: Image.Image, form: str = "PNG", **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format=form, **options)
    return buffer.getvalue()


def png(colour: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (6, 4)) -> bytes:
    """A picture of one colour as a PNG file."""
    return saved(Image.new("RGB", size, colour))


def png_of_size(width: int, height: int, packed: bytes = b"", bits: int = 8) -> bytes:
    """A PNG of colors that claims a size; its data are nothing, or what is given, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, bits, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")


# Conversations and records.


def talk(question: str, answer: str, *more: tuple[str, str], weight: float = 1.0) -> Conversation:
    """A conversation about one image; `more` holds further exchanges, and `weight` is the first answer's."""
    turns = [Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer, weight)]
    for asked, said in more:
        turns += [Turn("user", asked), Turn("assistant", said)]
    kind = "positive" if more else ""
    return Conversation(tuple(turns), kind=kind)


def conversation_of(
    texts: Sequence[str], weights: Sequence[float] = (), images: tuple[int, ...] = (), **fields: Any
) -> Conversation:
    """A conversation of these turns, user first; `weights` are the answers', and `images` all 0 by default."""
    turns = tuple(
        Turn(("user", "assistant")[n % 2], text, weights[n // 2] if n % 2 and weights else 1.0)
        for n, text in enumerate(texts)
    )
    return Conversation(turns, images or (0,) * sum(text.count(IMAGE) for text in texts), **fields)


BEGUN = [
    ("A cat.", " A dog."),
    ("A black c", "at. A dog."),
    ("A cat. ", "It sits."),
    ("A cat", ". It sits. #"),
    ("A", "x"),
]
"""(prefix, text) of answers: cut between tokens, within one, and beside white space."""


def check_begun(encoder: Encoder, tokenizer: Any, after: str, question: str, prefix: str, text: str) -> None:
    """Compare with the whole answer: the same tokens, those that end within the prefix or begin behind the text untaught.

    `after` is what the template writes behind an answer. Tokens are found by the text from each of them on.
    """

    def encode(**fields: Any) -> Tokens:
        asked = Turn("user", question), Turn("assistant", **{"text": prefix + text, "weight": 2.0} | fields)
        return encoder(Conversation(asked, (0,) * question.count(IMAGE)))

    whole, begun, opening = encode(), encode(text=text, prefix=prefix), encoder.template.answer_prefix
    sizes = [len("".join(tokenizer.decode(whole.ids[k:]).split())) for k in range(len(whole) + 1)]
    least, most, rest = (len("".join(f"{said}{after}".split())) for said in (text, opening + prefix + text, ""))
    within = [k for k in range(len(whole)) if sizes[k] <= most and sizes[k + 1] >= least]
    expected = whole.weights.copy()
    expected[within] = 0
    assert np.array_equal(whole.ids, begun.ids)
    assert np.array_equal(whole.image_slots, begun.image_slots)
    assert begun.weights.tolist() == expected.tolist()
    assert begun.weights.any()
    expected[[k for k in range(len(whole)) if sizes[k] <= rest]] = 0
    assert encode(text=text, prefix=prefix, ended=False).weights.tolist() == expected.tolist()


def check_any_cut(encoder: Encoder, turns: Sequence[str], cut: int) -> None:
    """Wherever the last answer is cut, its tokens stay, and those that lose their weight are in a row."""
    whole = conversation_of(turns)
    *before, last = whole.turns
    begun = Turn("assistant", last.text[cut:], prefix=last.text[:cut])
    if begun.is_begun:
        return
    before, after = encoder(whole), encoder(dataclasses.replace(whole, turns=(*before, begun)))
    assert before.ids.tolist() == after.ids.tolist()
    changed = np.flatnonzero(before.weights != after.weights)
    assert not after.weights[changed].any()
    supervised = np.flatnonzero(before.weights)
    assert np.isin(supervised, changed).sum() == len(changed) <= 2 * len(begun.prefix.encode())
    assert (np.diff(np.searchsorted(supervised, changed)) == 1).all()


def records(count: int, seed: int = 0) -> list[ImageRecord]:
    """Reflective records: two questions each, with a rationale behind a repeated answer."""
    rng = np.random.default_rng(seed)
    found = []
    for index in range(count):
        talks = []
        for question in range(2):
            words = [f"w{word}" for word in rng.integers(0, 50, 6)]
            asked, said = f"Is there {words[0]} at {question}?", f"{words[1]} {words[2]}"
            talks.append(talk(asked, said, ("Explain why.", f"{words[3]} {words[4]}.")))
            talks.append(talk(asked, said, ("Why is it wrong?", f"No {words[5]}."), weight=0.0))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        found.append(ImageRecord(f"r{index}", png(colour), tuple(talks)))
    return found


# Tokens.

WEIGHTS = (0.0, 0.0, 0.5, 1.0, 3.0)
"""Loss weights whose sums are exact in float32."""
Node = tuple[int, int]
"""(token id, image slot)"""


def tokens_of(nodes: Sequence[Node], weights: Sequence[float]) -> Tokens:
    ids, slots = zip(*nodes, strict=True) if nodes else ((), ())
    return Tokens(np.asarray(ids, np.int32), np.asarray(weights, np.float32), np.asarray(slots, np.int32))


def text_tokens(ids: Sequence[int], weights: Sequence[float] = ()) -> Tokens:
    """Text tokens; weights of the first ones may be left out, which are 0."""
    return tokens_of([(id, -1) for id in ids], [0.0] * (len(ids) - len(weights)) + [*weights])


@st.composite
def token_lists(draw: st.DrawFn, smallest: int = 0) -> list[Tokens]:
    """Conversations of a few segments, so that prefixes are shared at all depths and some repeat altogether.

    They have images, and text may have the placeholder's own id.
    """
    node = st.tuples(st.integers(1, 3), st.sampled_from((-1, -1, -1, 0, 1, 5)))
    segments = draw(st.lists(st.lists(node, min_size=1, max_size=4), min_size=1, max_size=4))
    plans = st.lists(st.integers(0, len(segments) - 1), min_size=1, max_size=4)
    drawn = []
    for plan in draw(st.lists(plans, min_size=smallest, max_size=7)):
        nodes = [node for number in plan for node in segments[number]]
        weights = [0.0] + [draw(st.sampled_from(WEIGHTS)) if slot < 0 else 0.0 for _, slot in nodes[1:]]
        drawn.append(tokens_of(nodes, weights))
    return drawn


# Rows.


class Given(Rows):
    """Rows that are in no file."""

    def __init__(self, rows: list, path: str = "f"):
        super().__init__(Path(path), min_rows=0)
        self.given = rows

    def _items(self):
        yield from ((None, row) for row in self.given)


def llava_row(image: str | None, *texts: str, **fields: Any) -> dict[str, Any]:
    """A row of LLaVA's, by default one question and its answer; without an image if `image` is None or empty."""
    turns = [{"from": ("human", "gpt")[n % 2], "value": text} for n, text in enumerate(texts or ("Q?", "A."))]
    return {"id": 1, "conversations": turns} | ({"image": image} if image else {}) | fields


def write_json_rows(path: Path, rows: Any) -> Path:
    """Write rows as JSON, or as JSON lines if the name ends in `.jsonl`; return the path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(map(json.dumps, rows)) if path.suffix == ".jsonl" else json.dumps(rows)
    path.write_text(text, "utf-8")
    return path


def write_parquet(path: Path, rows: list[dict[str, Any]], schema: Any = None, **options: Any) -> Path:
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows, schema), path, **options)
    return path


def read_examples(path: Path, **options: Any) -> tuple[list[Example], ReadLog]:
    """Return the examples of an annotation file, and what was noted while reading."""
    log = ReadLog()
    return list(sources.read(path, log, **options)), log


def read_records(*entries: Path | MixtureEntry, **options: Any) -> list[ImageRecord]:
    """Return the records of annotation files, each with its images in `images` beside it."""
    entries = tuple(entry if isinstance(entry, MixtureEntry) else MixtureEntry(file=entry) for entry in entries)
    with read_mixture(entries, ReadLog(), **options) as mixture:
        return list(mixture)


def texts(examples: Sequence[Example]) -> list[list[str]]:
    """The texts of the turns of each example."""
    return [[turn.text for turn in example.conversation.turns] for example in examples]


def kinds(examples: Sequence[Example]) -> list[str]:
    return [example.conversation.kind for example in examples]


def problem_rows(log: ReadLog) -> list[str]:
    """The rows that cannot be used, by id or number."""
    assert all(why and "\n" not in why for _, why in log.problems)
    return [where.rsplit("row ", 1)[1] for where, _ in log.problems]


def assert_one_line(error: pytest.ExceptionInfo[Exception], *names: object) -> None:
    """Check that an error is one line that has these names."""
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert str(name) in text
