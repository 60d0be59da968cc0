"""Text for messages: escapes names from untrusted sources, and shortens long lists."""

import re
import sys
from collections.abc import Sequence
from typing import TextIO

# Words of libraries' advice to load a file without protection.
_ADVICE = re.compile(
    r"weights_only|safe_globals|re-?running|torch\.load|trusted|arbitrary code|file an issue", re.IGNORECASE
)


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


def without_advice(text: str) -> str:
    """A library's ``text`` without the sentences that advise to load a file without protection."""
    if not _ADVICE.search(text):
        return text
    sentences = re.split(r"(?<=[.!?])\s+|\n+", text)
    return " ".join(part.strip() for part in sentences if part.strip() and not _ADVICE.search(part))


def reason(error: BaseException) -> str:
    """A library's error in one line: its type and its first line, `without_advice`."""
    told = without_advice(str(error)).strip()
    return f"{type(error).__name__}: {told.splitlines()[0] if told else ''}"[:300].removesuffix(": ")
