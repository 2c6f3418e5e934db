"""Every error the package raises on purpose: one sentence that says what, where and what to do."""


class CalderaError(Exception):
    """Base of all errors that are ours; the message is a sentence for the user."""


class UserError(CalderaError):
    """A setting or an input is wrong; the message names the field, the value and the remedy."""


class NumericalError(CalderaError):
    """A computation cannot go on: NaN, infinity or a factorisation that keeps failing."""


class CheckpointError(CalderaError):
    """A packed checkpoint is missing, truncated or changed."""
