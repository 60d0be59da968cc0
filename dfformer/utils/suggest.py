"""Suggestions for unknown names in error messages."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, known: Iterable[str]) -> str:
    """``"; did you mean A, B?"`` with at most three similar names, or ``""`` if there are none.

    For a name without its section, such as ``lr``, they are those of its settings in all sections: ``optim.lr``.
    """
    known = list(known)
    close = [other for other in known if other.endswith(f".{name.lstrip('-')}")][:3]
    close = close or difflib.get_close_matches(name, known, n=3)
    return f"; did you mean {', '.join(close)}?" if close else ""
