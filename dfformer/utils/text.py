"""Text for people: names that may hold anything, and lists that may be long."""

import sys
from collections.abc import Sequence
from typing import TextIO


def printable(text: object) -> str:
    """``text`` on one line: line breaks, other control characters and bytes that are not UTF-8 become escapes."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape", "replace").decode() for c in str(text))


def echo(*lines: str, file: TextIO | None = None) -> None:
    """Prints lines to ``file`` (default: stdout); characters it cannot encode become escapes instead of an error."""
    stream = file or sys.stdout
    encoding = stream.encoding or "utf-8"
    for line in lines:
        print(line.encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def abbreviate(names: Sequence[str], limit: int = 5) -> str:
    """``"a, b, c and 4 more"``."""
    rest = f" and {len(names) - limit} more" if len(names) > limit else ""
    return ", ".join(map(printable, names[:limit])) + rest
