"""Untrusted text in messages and logs: standard library only, because supervisors import this."""


def one_line(text: str, limit: int | None = None) -> str:
    """The text on one line, without control characters, and no longer than `limit` characters.

    So its author cannot write lines of a log.
    """
    return "".join(char if char.isprintable() else " " for char in text)[:limit]
