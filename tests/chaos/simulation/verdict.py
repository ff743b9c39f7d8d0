"""What an oracle finds."""


class Violation(Exception):
    """The agent has broken a promise."""
