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
