"""What the documentation says works as written."""

import re
import shlex
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from conftest import require
from dense_models import dense_checkpoint
from extent import FULL
from paths import ROOT
from PIL import Image
from torch import nn

import dfformer
import dfformer_kernels
from dfformer import DynamicFilter
from dfformer.cli import main
from dfformer.train import config as train_config

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
EVERY_PAGE = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
# A fenced block, and the comment in front of it that says why it is run with the long lists only.
BLOCK = re.compile(r"^(<!-- not run.*?-->\n)?```python\n(.*?)^```$", re.DOTALL | re.MULTILINE)
# A line, by itself or the rest of torchrun's.
COMMAND = re.compile(r"^    (?:torchrun .* -m )?(dfformer .*)$", re.MULTILINE)
LINK = re.compile(r"\]\((?!https?:)([^)#]+)")
# A name and the shape that a comment says it has.
SHAPE = re.compile(r"^(\w+) = .*# (?:complex )?\((\d+(?:,\d+)*)\)", re.MULTILINE)
# A file or folder of the project.
PATH = re.compile(r"`((?:benchmarks|csrc|dfformer|dfformer_kernels|docs|examples|recipes|tests)/[\w./*-]*)`")


def readers_own() -> dict[str, Any]:
    """What pages suppose that the reader has."""
    return {
        "their_model": nn.Sequential(DynamicFilter(8, size=6)),
        "images": torch.randn(1, 3, 40, 56),
        "image": torch.rand(3, 40, 56),
        "x": torch.randn(2, 6, 6, 8),
        "logits": torch.randn(2, 4, 8),
        "basis": torch.randn(6, 4, 4, 2),
    }


def _weights(path: Path) -> None:
    torch.save(timm.create_model("dfformer_s18").state_dict(), path)


ENCODER: dict[str, Any] = {"depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "img_size": 32}
FILES: dict[str, Callable[[Path], object]] = {
    "dfformer_s18.pth": _weights,
    "runs/segment_digits/last.safetensors": lambda path: dense_checkpoint("segment", path, "cdfformer_s18", ENCODER),
    "runs/detect_digits/last.safetensors": lambda path: dense_checkpoint("detect", path, "cdfformer_s18", ENCODER),
}


@pytest.mark.parametrize("page", [p for p in PAGES if BLOCK.search(p.read_text("utf-8"))], ids=lambda page: page.name)
def test_code_runs(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """All of a page in one namespace, in the order of reading."""
    monkeypatch.chdir(tmp_path)
    namespace, threads = readers_own(), torch.get_num_threads()
    blocks = list(BLOCK.finditer(page.read_text("utf-8")))
    for name, write in FILES.items():
        if any(name in block[2] for block in blocks):
            Path(name).parent.mkdir(parents=True, exist_ok=True)
            write(Path(name))
    run = {number: block[2] for number, block in enumerate(blocks, 1) if not block[1] or FULL}
    if not run:
        pytest.skip("all of its code takes long: DFFORMER_TEST_FULL=1")
    try:
        for number, code in run.items():
            exec(compile(code, f"{page.name}, block {number}", "exec"), namespace)
            for name, sizes in SHAPE.findall(code):
                assert f"{','.join(map(str, namespace[name].shape))}" == sizes, f"{page.name}: the shape of {name}"
    finally:
        torch.set_num_threads(threads)


@EVERY_PAGE
def test_commands_exist(page: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("dfformer_s18.pth", "cdfformer_s18.pth"):
        (tmp_path / name).touch()
    monkeypatch.chdir(tmp_path)
    for command in COMMAND.findall(page.read_text("utf-8").replace("\\\n", "")):
        assert "#" not in command, "comments stand above commands"
        prog, found, arguments = main._found(shlex.split(command)[1:])
        if found.own_parser:  # `dfformer train`
            train_config.parse(arguments)
        else:
            main._parsed(prog, found, arguments)


@EVERY_PAGE
def test_links_lead_somewhere(page: Path) -> None:
    targets = LINK.findall(page.read_text("utf-8"))
    assert [target for target in targets if not (page.parent / target).exists()] == []


@pytest.mark.parametrize("page", [*PAGES, ROOT / "CONTRIBUTING.md"], ids=lambda page: page.name)
def test_paths_exist(page: Path) -> None:
    """Those in backticks, with shell patterns."""
    named = PATH.findall(page.read_text("utf-8"))
    assert [name for name in named if not any(ROOT.glob(name.rstrip("/")))] == []


@pytest.mark.parametrize("page", PAGES[1:], ids=lambda page: page.name)
def test_a_page_begins_with_its_use_and_ends_with_where_to_go_next(page: Path) -> None:
    _, first, *_, last = page.read_text("utf-8").strip().split("\n\n")
    assert first.startswith("This page ")
    assert last.startswith("Next: ")
    assert LINK.search(last)


def test_the_recipe_on_its_page_is_the_recipe() -> None:
    block = (ROOT / "docs" / "own_folder.md").read_text("utf-8").split("```yaml\n")[1].split("```")[0]
    recipe = (ROOT / "recipes" / "transfer.yaml").read_text("utf-8")
    assert recipe.endswith(block)
    assert all(line.startswith("#") for line in recipe.removesuffix(block).splitlines())


def test_one_install_instruction() -> None:
    """From the checkout: `pip install .`, or with extras that exist."""
    section = (ROOT / "pyproject.toml").read_text("utf-8").split("[project.optional-dependencies]\n")[1].split("\n[")[0]
    extras = set(re.findall(r"^(\w+) = ", section, re.MULTILINE))
    for page in PAGES:
        for line in re.findall(r"pip install [^`\n|]*", re.sub(r"\n`", "", page.read_text("utf-8"))):
            assert re.match(r"pip install (\.|'(\.|dfformer)\[[a-z,]+\]'|datasets)", line), f"{page.name}: {line}"
            named = re.findall(r"\[([a-z,]+)\]", line)
            assert {extra for names in named for extra in names.split(",")} <= extras


def test_site(tmp_path: Path) -> None:
    require("docs", find_spec("material") is not None, "no mkdocs-material: pip install 'dfformer[docs]'")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(tmp_path)]
    built = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert built.returncode == 0, built.stderr
    api = (tmp_path / "api" / "index.html").read_text("utf-8")
    public = {*dfformer.__all__, *dfformer_kernels.__all__} - {"__version__"}
    assert [name for name in sorted(public) if f'.{name}"' not in api] == []


def test_pictures_have_all_their_colours() -> None:
    """A palette of 256 makes bands of what is smooth."""
    modes = {}
    for path in [*ROOT.glob("docs/images/*.png"), *ROOT.glob("benchmarks/results/*.png")]:
        with Image.open(path) as picture:
            modes[path.name] = picture.mode
    assert [name for name, mode in modes.items() if mode == "P"] == []
    assert len(modes) > 10
