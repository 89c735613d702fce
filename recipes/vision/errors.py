"""What is wrong with data, for whoever gave it."""


class DataError(ValueError):
    """A data set that is missing, damaged or too small for what was asked; the message says what to do."""
