"""Text that is safe to print, whatever a file is called."""


def printable(text: str) -> str:
    """Escape line breaks, control characters and bytes that are no text."""
    return "".join(
        char if char.isprintable() else char.encode("unicode_escape").decode() for char in text
    )
