"""Errors that a user can mend: one or two plain lines, an exit code, never a traceback."""


class FastmocoError(Exception):
    """A failure whose message says what is wrong and what to do about it."""

    exit_code = 1


class UsageError(FastmocoError):
    """The command line, the recipe or the environment is wrong."""

    exit_code = 2


class DataError(FastmocoError):
    """Images or shards are missing, damaged or do not fit together."""

    exit_code = 3


class CheckpointError(FastmocoError):
    """A checkpoint is damaged or belongs to another run."""

    exit_code = 4


class DivergedError(FastmocoError):
    """Numbers that are not finite: in training for too long, in a network or its output."""

    exit_code = 5
