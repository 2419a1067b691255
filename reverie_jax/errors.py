"""Errors caused by invalid user input."""


class UserError(ValueError):
    """Invalid input: the message is one line that names the file and record, and how to fix it. The CLI exits with 2."""


class DataError(UserError):
    """Data that cannot be used; the message names the file and record, and how to fix it."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and how to fix it."""
