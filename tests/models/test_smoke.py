import jax.numpy as jnp
import numpy as np


def test_forward_runs_typed(tiny_model):
    patches = tiny_model.config.vision.patches
    length = patches + 6
    tokens = jnp.full((2, length), 5, jnp.int32)
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32)[None], (2, length))
    slots = np.full((2, length), -1, np.int32)
    slots[:, 2 : 2 + patches] = np.arange(patches)
    pixels = jnp.zeros((2, 1, 24, 24, 3), jnp.uint8)
    hidden = tiny_model.hidden(tokens, positions, jnp.full((2, length), length, jnp.int32), jnp.asarray(slots), pixels)
    assert hidden.shape == (2, length, 48)
    assert np.isfinite(np.asarray(hidden)).all()
