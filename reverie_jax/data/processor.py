"""The processor of a checkpoint: images and conversations to the arrays that the model takes."""

from __future__ import annotations

import dataclasses
import io
import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from reverie_jax.data.conversation import IMAGE, Conversation, ImageRecord, Turn
from reverie_jax.data.images import PAD_COLOR, decode, pad_color, preprocess, to_rgb
from reverie_jax.data.packing import Batch, SequenceShape, make_element, pack_sequence, stack
from reverie_jax.data.templates import Template
from reverie_jax.data.tokenization import Encoder, Tokens
from reverie_jax.data.tree import build_tree
from reverie_jax.errors import UserError
from reverie_jax.models import VLMConfig
from reverie_jax.models.config import ImageAspectRatio, Tokenization

_log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Processor:
    """Turns images and conversations into the inputs of one checkpoint.

    Attributes:
        encoder: tokenizes conversations.
        image_size: side of the vision tower's input, in pixels.
        image_aspect_ratio: "pad" pads an image to a square, "square" crops and "stretch" stretches it.
        context: tokens of the longest conversation that the model supports.
        pad_color: color of the padding, in bytes.
    """

    encoder: Encoder
    image_size: int
    image_aspect_ratio: ImageAspectRatio = "pad"
    context: int = 4096
    pad_color: tuple[int, int, int] = PAD_COLOR

    @classmethod
    def from_config(cls, config: VLMConfig, tokenizer: Any, template: str | Template | None = None) -> Processor:
        """Return the processor of a model configuration and its tokenizer."""
        template = template or config.template
        inputs = config.image_tokens, config.image_token_id, config.tokenization, config.stop_ids
        encoder = Encoder(tokenizer, template, *inputs)
        vision, aspect = config.vision, config.image_aspect_ratio
        return cls(encoder, vision.image_size, aspect, config.text.context, pad_color(vision.mean))

    def override(
        self,
        template: str | Template | None = None,
        tokenization: Tokenization | None = None,
        image_aspect_ratio: ImageAspectRatio | None = None,
    ) -> Processor:
        """Return a processor with other settings than the checkpoint's, and log a warning where tokens change.

        Args:
            template: a chat template or its name; None keeps the checkpoint's, as for the other arguments.
            tokenization: "hf" or "llava".
            image_aspect_ratio: as for the attribute.
        """
        old = self.encoder
        tokenization = tokenization or old.tokenization
        template = old.template if template in (None, old.template.name) else template
        inputs = old.patches, old.image_token_id, tokenization, old.further_stop_ids
        encoder = Encoder(old.tokenizer, template, *inputs)
        if (encoder.template.name, tokenization) != (old.template.name, old.tokenization):
            _log.warning(
                "template %s, tokenization %s instead of the checkpoint's %s, %s",
                *(encoder.template.name, tokenization, old.template.name, old.tokenization),
            )
        return dataclasses.replace(
            self, encoder=encoder, image_aspect_ratio=image_aspect_ratio or self.image_aspect_ratio
        )

    def tokenize(self, name: str, conversations: Iterable[Conversation], new_tokens: int = 0) -> list[Tokens]:
        """Return the conversations' tokens. Each must fit the context; a tree of them need not, since only its depth counts.

        Args:
            name: name of the record, for errors.
            conversations: the conversations.
            new_tokens: tokens to be generated after each conversation.

        Raises:
            UserError: a conversation is too long; the record and the conversation's number are given.
        """
        tokenized = [self.encoder(conversation) for conversation in conversations]
        for number, tokens in enumerate(tokenized):
            if (length := len(tokens) + new_tokens) > self.context:
                raise UserError(
                    f"record {name}: conversation {number} has {length} tokens; the model supports up to {self.context}"
                )
        return tokenized

    def preprocess(self, encoded: bytes, name: str) -> UInt8[np.ndarray, "m S S 3"]:
        """Return an encoded image as the vision tower's input (m = 1), or no image for empty bytes (m = 0).

        Args:
            encoded: the file's content (PNG, JPEG, …).
            name: name of the image, for errors.

        Raises:
            BrokenImage: the bytes cannot be decoded as an image.
        """
        if not encoded:
            return np.zeros((0, self.image_size, self.image_size, 3), np.uint8)
        return preprocess(decode(encoded, name), self.image_size, self.image_aspect_ratio, self.pad_color)[None]

    def __call__(self, records: Sequence[ImageRecord]) -> Batch:
        """Return a batch of one sequence per record: a tree of its conversations and its image, for small inputs.

        Open conversations are numbered through all records in order. The sequences are as long as the longest tree.

        Args:
            records: records, for example from `ask`.

        Raises:
            UserError: there are no records, or a conversation is longer than the model's context.
            BrokenImage: an image cannot be decoded.
        """
        if not records:
            raise UserError("no records to make a batch of")
        elements, number = [], 0
        for record in records:
            tree = build_tree(self.tokenize(record.id, record.conversations))
            numbers = list(range(number, number + len(tree.leaves)))
            number += len(tree.leaves)
            elements.append(make_element(tree, self.preprocess(record.image, record.id), numbers))
        shape = SequenceShape(
            length=max(len(element["tokens"]) for element in elements),
            images=max(1, *(len(element["images"]) for element in elements)),
            edges=max(len(element["parent"]) for element in elements),
            questions=max(len(element["leaves"]) for element in elements),
        )
        sequences = [pack_sequence([element], shape, self.encoder.patches) for element in elements]
        return stack(sequences, len(sequences))


def ask(image: str | Path | bytes | Image.Image | np.ndarray | None, *questions: str) -> ImageRecord:
    """Return a record of an image and open questions about it, each a conversation of its own.

    Args:
        image: a path, the content of an image file, an image, its pixels as bytes (H W 3), or None for questions without
            an image.
        *questions: the questions. `<image>` marks where the image is shown; before the question by default.

    Raises:
        UserError: the file cannot be read, or an argument is something else.
    """
    if not questions or not all(isinstance(text, str) and text.strip() for text in questions):
        raise UserError(f"ask: the questions must be one or more texts, not {questions!r}")
    name = str(image) if isinstance(image, str | Path) else "image"
    if isinstance(image, np.ndarray):
        if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
            raise UserError(f"ask: pixels must be uint8 of shape (H, W, 3), not {image.dtype} of {image.shape}")
        image = Image.fromarray(image)
    if isinstance(image, Image.Image):
        buffer = io.BytesIO()
        to_rgb(image).save(buffer, format="PNG")
        encoded = buffer.getvalue()
    elif isinstance(image, str | Path):
        try:
            encoded = Path(image).read_bytes()
        except OSError as error:
            raise UserError(f"{image}: cannot be read ({error.strerror})") from None
        if not encoded:
            raise UserError(f"{image}: an empty file")
    elif image is None or isinstance(image, bytes):
        encoded = image or b""
    else:
        raise UserError(f"ask: the image must be a path, bytes, an image, pixels or None, not {type(image).__name__}")
    return ImageRecord(name, encoded, tuple(_open_conversation(text, bool(encoded)) for text in questions))


def _open_conversation(text: str, has_image: bool) -> Conversation:
    """Return a conversation of one question; the image is where its marker is, or before it.

    Raises:
        UserError: there are more markers than images.
    """
    if (markers := text.count(IMAGE)) > has_image:
        raise UserError(f"{text!r}: {markers} {IMAGE} for {int(has_image)} image(s); a question shows its image once")
    marker = f"{IMAGE}\n" if has_image and not markers else ""
    return Conversation((Turn("user", marker + text),), (0,) if has_image else ())
