"""The one exception that a user's mistake raises."""


class RefpeftError(ValueError):
    """A mistake in what was asked for: says what was found, what was expected, and what to do. The CLI prints it as one line."""
