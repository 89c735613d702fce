"""ConfigError, which ends a command with exit code 2."""


class ConfigError(ValueError):
    """A configuration cannot be used; the message names the field, what came and what to do."""
