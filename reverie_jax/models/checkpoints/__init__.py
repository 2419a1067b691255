"""Checkpoints on disk: name tables, a strict reader, writers. The only part of `models` that touches files."""

from reverie_jax.models.checkpoints.errors import CheckpointError
from reverie_jax.models.checkpoints.llava_hf import fingerprint, read_config, read_model, write_model

__all__ = ["CheckpointError", "fingerprint", "read_config", "read_model", "write_model"]
