"""What goes wrong with a checkpoint."""

from reverie_jax.errors import UserError


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what would help."""
