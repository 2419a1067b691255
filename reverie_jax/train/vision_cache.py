"""Runs a frozen tower once over a training set's pictures (`--cache-vision`)."""

from __future__ import annotations

import hashlib
import itertools
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path

import jax
import numpy as np
from flax import nnx
from jax.experimental import multihost_utils
from jaxtyping import Array, Float, UInt8

from reverie_jax.data.conversation import ImageRecord
from reverie_jax.data.feature_cache import FeatureCache, exists, write
from reverie_jax.data.processor import Processor
from reverie_jax.models import VisionLanguageModel
from reverie_jax.models.checkpoints import base_checksums
from reverie_jax.models.vision import normalize

_log = logging.getLogger(__name__)

_TOGETHER = 16
"""Pictures that the tower sees at once."""


def key_of(model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord]) -> str:
    """What features depend on: the tower's content, the layer, how pictures are made square, and which they are."""
    config = model.config
    digest = hashlib.sha256()
    tower = base_checksums(model)["vision"], config.feature_layer, config.vision.image_size, processor.image_aspect_ratio
    digest.update(repr((tower, str(model.compute_dtype), len(records))).encode())
    for record in (records[number] for number in range(len(records))):
        digest.update(record.id.encode() + b"\0" + hashlib.sha256(record.image).digest())
    return digest.hexdigest()


def cached(
    model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord], folder: Path
) -> FeatureCache:
    """The features of every record's picture, from the folder, or counted now and put there (by the first process).

    Raises:
        DataError: the folder's are of another tower or other pictures.
        BrokenImage: a picture cannot be read.
    """
    key = key_of(model, processor, records)
    if jax.process_index() == 0 and not exists(folder):
        _log.info("counting vision features of %d records: %s", len(records), folder)
        config = model.config.vision
        write(folder, key, (config.patches, config.hidden), _features(model, processor, records))
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices("vision features")
    return FeatureCache(folder, key)


def _features(
    model: VisionLanguageModel, processor: Processor, records: Sequence[ImageRecord]
) -> Iterator[Float[np.ndarray, "P W"]]:
    graph, state = nnx.split(model.vision)
    depth, dtype = model.config.feature_depth, model.compute_dtype

    @jax.jit
    def run(state: nnx.State, pixels: UInt8[Array, "B S S 3"]) -> Float[Array, "B P W"]:
        return nnx.merge(graph, state)(normalize(pixels, dtype), depth)

    numbers = iter(range(len(records)))
    while part := list(itertools.islice(numbers, _TOGETHER)):
        pixels = [processor.pixels(record.image, record.id) for record in (records[number] for number in part)]
        shown = np.concatenate(pixels)
        filled = np.zeros((_TOGETHER, *shown.shape[1:]), np.uint8)
        filled[: len(shown)] = shown
        found = iter(np.asarray(run(state, filled)))
        for one in pixels:
            yield next(found) if len(one) else np.zeros((0, model.config.vision.hidden), dtype)
