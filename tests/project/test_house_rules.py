"""The limits that CONTRIBUTING.md sets: lines of a function, lines of a file, files of code in a folder."""

import ast
import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from paths import ROOT

FOLDERS = ("benchmarks", "csrc", "dfformer", "dfformer_kernels", "examples", "tests")
SUFFIXES = (".py", ".cpp", ".cu", ".h", ".inl")
CODE = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*") if path.suffix in SUFFIXES]


def functions(path: Path) -> Iterator[tuple[str, int]]:
    """Names and lines of the functions; in C++ every block but that of a namespace, type or list."""
    text = path.read_text("utf-8")
    if path.suffix == ".py":
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno:
                yield node.name, node.end_lineno - node.lineno + 1
        return
    text, opened = re.sub(r"""//.*|"(\\.|[^"\\])*"|'.'""", "", text), list[int]()
    for brace in re.finditer(r"[{}]", text):
        if brace[0] == "{":
            opened.append(brace.start())
            continue
        start = opened.pop()
        head = re.split(r"[;{}]", text[:start])[-1].lstrip()
        if not re.search(r"\b(namespace|struct|class|enum|extern)\b|=\s*$", head):
            yield head, text.count("\n", start - len(head), brace.end()) + 1


def test_functions_have_at_most_60_lines() -> None:
    found = [(path, *function) for path in CODE for function in functions(path)]
    assert len(found) > 3000
    assert [f"{path}: {name}: {lines} lines" for path, name, lines in found if lines > 60] == []


def test_files_have_at_most_400_lines_and_folders_12_files() -> None:
    lines = {path: len(path.read_text("utf-8").splitlines()) for path in CODE}
    assert [f"{path}: {n} lines" for path, n in lines.items() if n > 400] == []
    assert [f"{folder}: {n} files" for folder, n in Counter(path.parent for path in CODE).items() if n > 12] == []
