"""A checkpoint folder as a model and the encoder that speaks its language."""

from __future__ import annotations

from pathlib import Path

import jax.numpy as jnp
from jax.sharding import Mesh
from jax.typing import DTypeLike
from transformers import AutoTokenizer

from reverie_jax.data.conversation import Encoder
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import CheckpointError, read_model

SCENES_BASE = "scenes-base"
"""Names the small base that ships with the package."""


def checkpoint_folder(name: str | Path) -> Path:
    """The folder of a checkpoint: the shipped base by its name, anything else as a path."""
    return Path(__file__).parent / "scenes" / "base" if str(name) == SCENES_BASE else Path(name)


def load_model(
    path: str | Path, *, mesh: Mesh | None = None, dtype: DTypeLike = jnp.float32
) -> tuple[VisionLanguageModel, Encoder]:
    """A model and its encoder from a llava-hf folder.

    Args:
        path: the folder, or "scenes-base".
        mesh: where the parameters go; one device by default.
        dtype: of matrices and computation.

    Raises:
        CheckpointError: weights, configuration or tokenizer cannot be used.
    """
    folder = checkpoint_folder(path)
    model = read_model(folder, dtype=dtype, mesh=mesh)
    config = model.config
    if not any((folder / name).exists() for name in ("tokenizer.json", "tokenizer.model")):
        raise CheckpointError(f"{folder}: no tokenizer.json or tokenizer.model")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        raise CheckpointError(f"{folder}: the tokenizer cannot be read ({' '.join(str(error).split())})") from None
    if len(tokenizer) > config.text.vocab:
        raise CheckpointError(
            f"{folder}: the tokenizer has {len(tokenizer)} entries, the model's vocabulary {config.text.vocab}"
        )
    return model, Encoder(tokenizer, config.template, config.vision.patches, config.image_token_id)
