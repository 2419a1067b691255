"""Small stand-ins: a tokenizer that needs no training, and records that need no renderer."""

from __future__ import annotations

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
import pytest
from PIL import Image

from reverie_jax.data import sources
from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.mixture import MixtureEntry, read_mixture
from reverie_jax.data.row_files import Rows
from reverie_jax.data.sources import Example, ReadLog

IMAGE_ID = 3


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


def png(colour: tuple[int, int, int] = (10, 200, 30), size: tuple[int, int] = (6, 4)) -> bytes:
    """A picture of one colour as a PNG file."""
    buffer = io.BytesIO()
    Image.new("RGB", size, colour).save(buffer, format="PNG")
    return buffer.getvalue()


def talk(question: str, answer: str, *more: tuple[str, str], weight: float = 1.0) -> Conversation:
    """A conversation about one image; `more` holds further exchanges, and `weight` is the first answer's."""
    turns = [Turn("user", f"{IMAGE}\n{question}"), Turn("assistant", answer, weight)]
    for asked, said in more:
        turns += [Turn("user", asked), Turn("assistant", said)]
    kind = "positive" if more else ""
    return Conversation(tuple(turns), kind=kind)


class Given(Rows):
    """Rows that are in no file."""

    def __init__(self, rows: list, path: str = "f"):
        super().__init__(Path(path), min_rows=0)
        self.given = rows

    def _rows(self):
        yield from self.given


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


def assert_one_line(error: pytest.ExceptionInfo[Exception], *names: object) -> None:
    """Check that an error is one line that has these names."""
    text = str(error.value)
    assert "\n" not in text
    for name in names:
        assert str(name) in text


def png_of_size(width: int, height: int, packed: bytes = b"") -> bytes:
    """A PNG that claims a size; its data are nothing, or what is given, compressed."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", packed) + chunk(b"IEND", b"")
