"""What goes wrong with a checkpoint."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what would help."""
