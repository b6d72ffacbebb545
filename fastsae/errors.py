"""The exception tree. Every message names the value, what is allowed and what to do."""


class FastSAEError(Exception):
    """Base of every error that a user of fastsae can cause and mend. The CLI prints it and exits 2."""


class ConfigError(FastSAEError, ValueError):
    """A field of the config, or a combination of fields, cannot work."""


class DataError(FastSAEError):
    """A dataset cannot be read, or does not hold what the config says."""


class SourceError(FastSAEError):
    """The source model cannot be loaded, or has no such hook point."""


class RunError(FastSAEError):
    """A run folder, a checkpoint or an SAE folder cannot be written or read."""


class NonFiniteLossError(FastSAEError):
    """The loss became NaN or infinite."""


def reason(error: BaseException) -> str:
    """What went wrong, in one line: the system's words, or the first line of the error's own."""
    return getattr(error, "strerror", None) or first_line(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message, or its type where it has none."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
