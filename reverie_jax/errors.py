"""The one kind of error that is the user's to mend."""


class UserError(ValueError):
    """Bad input: the message is one clear line that names the file, the record and the remedy. The CLI exits with 2."""


class DataError(UserError):
    """Data that cannot be used; the message names the file, the record and the remedy."""


class CheckpointError(UserError):
    """A checkpoint that cannot be used; the message names the file, what is wrong and what would help."""
