"""Pictures and words to the arrays that a model takes."""

from __future__ import annotations

import dataclasses
import io
import json
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.images import decode, preprocess, to_rgb
from reverie_jax.data.packing import Batch, SequenceShape, element, row, stack
from reverie_jax.data.templates import Template, v0
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.errors import UserError
from reverie_jax.models import VLMConfig
from reverie_jax.models.config import ImageAspectRatio, Tokenization

_log = logging.getLogger(__name__)

EXAMPLE = "template_example.json"


@dataclasses.dataclass(frozen=True)
class Processor:
    """What turns records into batches for one checkpoint.

    Attributes:
        encoder: words.
        image_size: side of the tower's input, in pixels.
        aspect: pictures are padded to squares, or cropped.
        context: longest conversation that the decoder is exact on.
    """

    encoder: Encoder
    image_size: int
    image_aspect_ratio: ImageAspectRatio = "pad"
    context: int = 4096

    @classmethod
    def of(cls, config: VLMConfig, tokenizer: Any, template: str | Template | None = None) -> Processor:
        """The processor that an architecture asks for, around its tokenizer."""
        encoder = Encoder(
            tokenizer, template or config.template, config.vision.patches, config.image_token_id, config.tokenization
        )
        return cls(encoder, config.vision.image_size, config.image_aspect_ratio, config.text.context)

    def using(
        self,
        template: str | Template | None = None,
        tokenization: Tokenization | None = None,
        image_aspect_ratio: ImageAspectRatio | None = None,
    ) -> Processor:
        """The same with another template, manner of tokens or of making pictures square than the checkpoint's own; the first
        two are told in the log.
        """
        now = self.encoder
        chosen = now.template if template is None else template
        manner = tokenization or now.tokenization
        encoder = Encoder(now.tokenizer, chosen, now.patches, now.image_token_id, manner)
        if (encoder.template.name, manner) != (now.template.name, now.tokenization):
            _log.warning(
                "template %s, tokens %s instead of the checkpoint's %s, %s",
                *(encoder.template.name, manner, now.template.name, now.tokenization),
            )
        return dataclasses.replace(
            self, encoder=encoder, image_aspect_ratio=image_aspect_ratio or self.image_aspect_ratio
        )

    def tokens(self, name: str, conversations: Iterable[Conversation], more: int = 0) -> list[Tokens]:
        """Conversations as numbers. None is longer than the decoder is exact on; a tree may be: only its depth counts.

        Args:
            name: the record's, for errors.
            more: tokens that are to follow.

        Raises:
            UserError: one is too long; the record and the conversation are named.
        """
        found = [self.encoder(talk) for talk in conversations]
        for number, tokens in enumerate(found):
            if (length := len(tokens) + more) > self.context:
                raise UserError(
                    f"record {name}: conversation {number} has {length} tokens; the model is exact up to {self.context}"
                )
        return found

    def pixels(self, encoded: bytes, name: str) -> UInt8[np.ndarray, "m S S 3"]:
        """One picture as the tower takes it; none where there are no bytes.

        Raises:
            BrokenImage: the bytes cannot be read as a picture.
        """
        if not encoded:
            return np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return preprocess(decode(encoded, name), self.image_size, pad=self.image_aspect_ratio == "pad")[None]

    def __call__(self, conversations: Sequence[ImageRecord]) -> Batch:
        """One row a record: its conversations as one tree, around its picture. For tests and small use.

        Open conversations are leaves, numbered through all records in order. Rows are as long as the longest tree.

        Args:
            conversations: records; `ask` makes them.

        Raises:
            UserError: there are none, or one is longer than the decoder's context.
            BrokenImage: a picture cannot be read.
        """
        if not conversations:
            raise UserError("no conversations to make a batch of")
        elements, number = [], 0
        for record in conversations:
            tree = build_tree(self.tokens(record.id, record.conversations))
            numbers = list(range(number, number + len(tree.leaves)))
            number += len(tree.leaves)
            elements.append(element(tree, self.pixels(record.image, record.id), numbers))
        shape = SequenceShape(
            length=max(len(e["tokens"]) for e in elements),
            images=max(1, *(len(e["pixels"]) for e in elements)),
            edges=max(len(e["source"]) for e in elements),
            questions=max(len(e["leaves"]) for e in elements),
        )
        rows = [row([e], shape, self.encoder.patches) for e in elements]
        return stack(rows, len(rows))


def ask(image: str | Path | bytes | Image.Image | None, *questions: str) -> ImageRecord:
    """A picture with questions that wait for their answers, each a conversation of its own.

    Args:
        image: a path, an encoded file, a picture, or None for questions about nothing shown.

    Raises:
        UserError: the path cannot be read.
    """
    name = str(image) if isinstance(image, str | Path) else "picture"
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, format="PNG")
        encoded = buffer.getvalue()
    elif isinstance(image, str | Path):
        try:
            encoded = Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"{image}: cannot be read ({error.strerror})") from None
    else:
        encoded = image or b""
    shown = f"{IMAGE}\n" if encoded else ""
    images = (0,) if encoded else ()
    return ImageRecord(name, encoded, tuple(Conversation((Turn("user", shown + text),), images) for text in questions))


def example_template(folder: Path) -> Template | None:
    """`v0` with the example dialogue that lies in the checkpoint folder, if one does.

    Raises:
        UserError: the file is broken.
    """
    path = folder / EXAMPLE
    if not path.exists():
        return None
    try:
        raw = json.loads(path.read_text("utf-8"))
        return v0(raw["question"], raw["answer"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f'{path}: not {{"question": …, "answer": …}} ({error!r})') from None
