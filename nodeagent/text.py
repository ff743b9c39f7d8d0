"""Text of others in our messages and logs: standard library only, because supervisors import this."""


def one_line(text: str, limit: int | None = None) -> str:
    """`text` on one line, without what a terminal obeys, and no longer than `limit` characters.

    Whoever wrote it then makes no line of a log of his own.
    """
    return "".join(char if char.isprintable() else " " for char in text)[:limit]
