"""Checkpoints on disk: readers, writers, adapters, checksums. The only part of `models` that touches files."""

from reverie_jax.models.checkpoints.adapters import attach_adapter
from reverie_jax.models.checkpoints.checksums import base_checksums, weights_checksum
from reverie_jax.models.checkpoints.read import read_config, read_model
from reverie_jax.models.checkpoints.write import write_model

__all__ = ["attach_adapter", "base_checksums", "read_config", "read_model", "weights_checksum", "write_model"]
