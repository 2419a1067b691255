"""Features of the frozen vision tower, computed once for a training set (`--cache-vision`)."""

from __future__ import annotations

import hashlib
import itertools
import logging
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
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.models.vision import normalize

_log = logging.getLogger(__name__)

_IMAGES_PER_BATCH = 16


def cache_key(model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord]) -> str:
    """Return a digest of everything features depend on: tower weights, feature layer, preprocessing and images."""
    config = model.config
    digest = hashlib.sha256()
    tower = (
        base_checksums(model)["vision"],
        config.feature_layer,
        config.vision.image_size,
        processor.image_aspect_ratio,
    )
    digest.update(repr((tower, str(model.compute_dtype), len(records))).encode())
    for record in (records[number] for number in range(len(records))):
        digest.update(record.id.encode() + b"\0" + hashlib.sha256(record.image).digest())
    return digest.hexdigest()


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
        config = model.config.vision
        write_features(folder, key, (config.patches, config.hidden), _compute_features(model, processor, records))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("vision features")
    return FeatureCache(folder, key)


def _compute_features(
    model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord]
) -> Iterator[Float[np.ndarray, "P W"]]:
    graph, state = nnx.split(model.vision)
    depth, dtype = model.config.feature_depth, model.compute_dtype

    @jax.jit
    def run_tower(state: nnx.State[Any, Any], pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        return nnx.merge(graph, state)(normalize(pixels, dtype), depth)

    numbers = iter(range(len(records)))
    while part := list(itertools.islice(numbers, _IMAGES_PER_BATCH)):
        images = [processor.preprocess(record.image, record.id) for record in (records[number] for number in part)]
        pixels = np.concatenate(images)
        padded = np.zeros((_IMAGES_PER_BATCH, *pixels.shape[1:]), np.uint8)
        padded[: len(pixels)] = pixels
        features = iter(np.asarray(run_tower(state, padded)))
        for image in images:
            yield next(features) if len(image) else np.zeros((0, model.config.vision.hidden), dtype)
