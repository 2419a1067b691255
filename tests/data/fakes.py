"""Small stand-ins: a tokenizer that needs no training, and records that need no renderer."""

from __future__ import annotations

import io
import re
import zlib
from collections.abc import Sequence
from pathlib import Path
from types import MappingProxyType

import numpy as np
from PIL import Image

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.row_files import Rows

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
