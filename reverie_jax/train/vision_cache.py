"""Features of the frozen vision tower, computed once for a training set (`--cache-vision`)."""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import logging
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, UInt8

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.feature_cache import FeatureCache, is_complete, write_features
from reverie_jax.data.processor import Processor
from reverie_jax.errors import UserError
from reverie_jax.models import VisionLanguageModel, lora
from reverie_jax.models.checkpoints.checksums import weights_checksum
from reverie_jax.models.vision import normalize
from reverie_jax.train.recipe import Recipe

_log = logging.getLogger(__name__)

_IMAGES_PER_BATCH = 16


def cache_key(model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord]) -> str:
    """Return a digest of all that features depend on: the tower, its adapters and settings, image processing, images."""
    adapters = [(path, layer.lora_scale, layer.lora_enabled) for path, layer, *_ in lora.adapters(model.vision)]
    # All of the processor's settings but those of its texts, whichever there are.
    images = {field.name: getattr(processor, field.name) for field in dataclasses.fields(processor)}
    images.pop("encoder")
    tower = (
        weights_checksum(model.vision),
        adapters,
        model.config.vision,
        model.config.feature_layers,
        model.config.feature_select,
    )
    digest = hashlib.sha256(repr((tower, images, str(model.compute_dtype), len(records))).encode())
    for record in (records[number] for number in range(len(records))):
        digest.update(hashlib.sha256(record.image).digest())
    return digest.hexdigest()


def frozen_features(
    model: VisionLanguageModel,
    processor: Processor,
    records: Sequence[ImageRecord],
    folder: Path | None,
    recipe: Recipe,
) -> FeatureCache | None:
    """Return `cached_features` for a run, None without a folder.

    Raises:
        UserError: the recipe trains the tower or adapters on it, or crops or flips images: features then change.
    """
    if folder is None:
        return None
    causes = {"trainable=all": recipe.trainable == "all", "crop_scale": recipe.crop_scale, "flip": recipe.flip}
    if any(causes.values()):
        raise UserError(
            f"--cache-vision needs a frozen vision tower and whole images, but recipe {recipe.name} sets"
            f" {' and '.join(name for name, is_set in causes.items() if is_set)}; leave --cache-vision out, or crops and"
            " flips (crop_scale=none flip=false)"
        )
    trained = [
        path
        for path, layer in lora.linears(model)
        if path.startswith("vision.") and (layer.lora_a is not None or re.fullmatch(recipe.target_modules, path))
    ]
    if recipe.has_adapters and trained:
        raise UserError(
            f"--cache-vision needs a frozen vision tower, but recipe {recipe.name} trains adapters on {trained[0]};"
            " leave --cache-vision out, or merge the adapters first"
        )
    return cached_features(model, processor, records, folder)


def cached_features(
    model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord], folder: Path
) -> FeatureCache:
    """Return the features of every record's image; process 0 computes and writes them if the folder has none.

    Raises:
        DataError: the folder holds features of another tower or of other images.
        BrokenImage: an image cannot be decoded.
    """
    key = cache_key(model, processor, records)
    if jax.process_index() == 0 and not is_complete(folder):
        _log.info("computing vision features of %d records: %s", len(records), folder)
        config = model.config
        write_features(
            folder, key, (config.features, config.feature_width), _compute_features(model, processor, records)
        )
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("vision features")
    return FeatureCache(folder, key)


def _compute_features(
    model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord]
) -> Iterator[Float[np.ndarray, "P W"]]:
    graph, state = nnx.split(model.vision)
    config, dtype = model.config, model.compute_dtype

    @jax.jit
    def run_tower(state: nnx.State[Any, Any], pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        pixels = normalize(pixels, config.vision, dtype)
        return nnx.merge(graph, state)(pixels, config.feature_depths, select=config.feature_select)

    numbers = iter(range(len(records)))
    while part := list(itertools.islice(numbers, _IMAGES_PER_BATCH)):
        images = [processor.preprocess(record.image, record.id) for record in (records[number] for number in part)]
        pixels = np.concatenate(images)
        padded = np.zeros((_IMAGES_PER_BATCH, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        features = iter(np.asarray(run_tower(state, padded)))
        for image in images:
            yield next(features) if len(image) else np.zeros((0, config.feature_width), dtype)
