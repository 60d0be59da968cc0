"""How much is tested."""

import os
from collections.abc import Mapping, Sequence
from itertools import combinations, product
from typing import Any

import pytest

# Set by `make test-full`: all combinations instead of pairs, and what takes minutes.
FULL = bool(os.environ.get("DFFORMER_TEST_FULL"))


def slow(*parameters: Any) -> list[Any]:
    """Parameters, of several arguments each or of one, that only `make test-full` runs."""
    return [pytest.param(*(p if isinstance(p, tuple) else (p,)), marks=pytest.mark.slow) for p in parameters]


def pairwise(**axes: Sequence[Any]) -> Mapping[str, Any]:
    """Arguments of ``pytest.mark.parametrize``: combinations of one value per axis, so few that every two values of
    different axes meet in one of them. All combinations with DFFORMER_TEST_FULL=1. The axes ``isa`` and ``target`` are
    the fixtures. Values may be those of ``pytest.param``.
    """
    sizes = [range(len(values)) for values in axes.values()]
    chosen = list(product(*sizes)) if FULL else _covering(sizes)
    rows = [_joined([values[i] for values, i in zip(axes.values(), row, strict=True)]) for row in chosen]
    indirect = [name for name in axes if name in ("isa", "target")]
    return {"argnames": tuple(axes), "argvalues": rows, "indirect": indirect, "ids": str}


def _joined(values: Sequence[Any]) -> Any:
    """One parameter of several, with the marks of all."""
    parameters = [value if hasattr(value, "marks") else pytest.param(value) for value in values]
    return pytest.param(*(p.values[0] for p in parameters), marks=[mark for p in parameters for mark in p.marks])


def _covering(sizes: Sequence[range]) -> list[tuple[int, ...]]:
    def pair(row: Mapping[int, int], axis: int, other: int) -> tuple[int, int, int, int]:
        first, second = sorted((axis, other))
        return first, row[first], second, row[second]

    missing = {
        (axis, i, other, j)
        for axis, other in combinations(range(len(sizes)), 2)
        for i in sizes[axis]
        for j in sizes[other]
    }
    rows = []
    while missing:
        axis, i, other, j = min(missing)
        row = {axis: i, other: j}
        for free in set(range(len(sizes))) - row.keys():
            gains = [sum(pair({**row, free: v}, free, set_) in missing for set_ in row) for v in sizes[free]]
            row[free] = gains.index(max(gains))
        missing -= {pair(row, a, b) for a, b in combinations(row, 2)}
        rows.append(tuple(row[axis] for axis in range(len(sizes))))
    return rows
