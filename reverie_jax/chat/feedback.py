"""Feedback as preference pairs, in a file that `reverie data build` reads."""

from __future__ import annotations

import io
import json
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from reverie_jax.data.sources.common import content_digest
from reverie_jax.errors import UserError
from reverie_jax.files import atomic_write, well_formed

PAIRS, IMAGES = "pairs.jsonl", "images"


class FeedbackFolder:
    """A folder of preference pairs: `pairs.jsonl`, and the pictures that they are about in `images`.

    Args:
        folder: It is made when the first pair is added; older pairs in it are kept.
    """

    def __init__(self, folder: Path):
        self.folder, self.path = folder, folder / PAIRS
        self._lock = threading.Lock()

    def add(self, pair: dict[str, Any], image: bytes) -> None:
        """Append a pair of `ChatSession.correct` or `ChatSession.prefer`.

        Args:
            pair: Question or prompt, chosen and rejected answer.
            image: The encoded picture.

        Raises:
            UserError: The folder cannot be written.
        """
        with Image.open(io.BytesIO(image)) as opened:
            name = f"{content_digest(image)}.{(opened.format or 'image').lower()}"
        row = {"ds_name": "chat", "image": name, **pair}
        with self._lock:
            if not (self.folder / IMAGES / name).exists():
                atomic_write(self.folder / IMAGES / name, image)
            try:
                with self.path.open("a+", encoding="utf-8") as file:
                    file.write(json.dumps(well_formed(row), ensure_ascii=False) + "\n")
            except OSError as error:
                raise UserError(f"{self.path}: cannot be written ({error.strerror or error})") from None
