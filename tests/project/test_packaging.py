"""What users install: a source distribution, a wheel built from it, and what runs from that wheel."""

import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
from pathlib import Path
from zipfile import ZipFile

import pytest
import yaml
from conftest import require, require_compiler
from extent import FULL
from paths import ROOT

from dfformer_kernels import __version__
from dfformer_kernels.backend.cuda import sources
from dfformer_kernels.backend.cuda.sources import cuda_sources
from dfformer_kernels.problem import KernelBuildError

BUILD_SDIST = "import sys; from setuptools import build_meta; build_meta.build_sdist(sys.argv[1])"


def run(*command: str | Path, cwd: Path, **environment: str) -> str:
    """Standard output; nothing is looked for on the network."""
    environment = dict(os.environ) | {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"} | environment
    done = subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built from what git has or would add: no build output of this checkout helps it along."""
    require("git", (ROOT / ".git").exists() and bool(shutil.which("git")), "not a git checkout")
    tree, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("sdist")
    listing = run("git", "ls-files", "-z", "--cached", "--others", "--exclude-standard", cwd=ROOT)
    for name in filter(None, listing.split("\0")):
        if (ROOT / name).is_file():  # and not deleted since, nor a link to a folder
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / name, tree / name)
    run(sys.executable, "-c", BUILD_SDIST, folder, cwd=tree)
    (path,) = folder.glob("*.tar.gz")
    return path


def build_wheel(sdist: Path, folder: Path, **environment: str) -> Path:
    pip_wheel = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation", "--no-cache-dir")
    run(*pip_wheel, sdist, "--wheel-dir", folder, cwd=folder, **environment)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """With the compiled core: built once."""
    require_compiler()
    folder = tmp_path_factory.mktemp("wheel")
    return build_wheel(sdist, folder, **({} if FULL else without_optimisation(folder)))


def without_optimisation(folder: Path) -> dict[str, str]:
    """A compiler in place of the system's that neither optimises nor inlines, which is most of the time it takes."""
    compiler = folder / "unoptimised"
    compiler.write_text(f'#!/bin/sh\nexec {os.environ.get("CXX", "g++")} "$@" -O0 -DFFT_INLINE=inline -w\n')
    compiler.chmod(0o755)
    return {"CXX": str(compiler), "CC": str(compiler)}


def contents(wheel: Path) -> list[str]:
    with ZipFile(wheel) as archive:
        return archive.namelist()


def installed(wheel: Path, kind: str) -> str:
    """What installed.py prints of the wheel, outside the checkout."""
    target, script = wheel.parent / "installed", ROOT / "tests" / "project" / "installed.py"
    run(sys.executable, "-m", "pip", "install", "--no-deps", "--target", target, wheel, cwd=wheel.parent)
    # -S leaves out .pth files: through an editable install's, Python would find the checkout's compiled core.
    path = os.pathsep.join([str(target), sysconfig.get_path("purelib"), sysconfig.get_path("platlib")])
    return run(sys.executable, "-S", script, kind, target, cwd=wheel.parent, PYTHONPATH=path).strip()


def run_time_sources() -> set[str]:
    """What is compiled where there is a GPU, as the wheel names it."""
    csrc = ROOT / "csrc"
    paths = [*csrc.glob("cuda/*.cu"), *csrc.glob("cuda/*.inl"), *csrc.glob("fft/*.inl")]
    return {f"dfformer_kernels/csrc/{path.relative_to(csrc).as_posix()}" for path in paths}


def has_core(names: list[str]) -> bool:
    return any(name.startswith("dfformer_kernels/_C.") for name in names)


def test_a_wheel_built_from_the_sdist_has_the_compiled_core(wheel: Path) -> None:
    names = contents(wheel)
    assert has_core(names)
    assert {"dfformer/py.typed", "dfformer_kernels/py.typed"} <= set(names)
    assert {"dfformer/analysis/report.html", "dfformer/export/model_card.md"} <= set(names)
    assert [name for name in names if name.endswith("LICENSE")] != []
    assert {name.split("/")[0].split("-")[0] for name in names} == {"dfformer", "dfformer_kernels"}
    assert {name for name in names if name.endswith((".cpp", ".h", ".inl", ".cu"))} == run_time_sources()
    recipes = {f"dfformer/recipes/{path.name}" for path in (ROOT / "recipes").glob("*.yaml")}
    assert {name for name in names if name.endswith(".yaml")} == recipes != set()
    assert installed(wheel, "core") == " ".join(["core", *sorted(cuda_sources())])


def test_without_a_compiler_the_wheel_works_through_torch(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, CC="false", CXX="false")
    assert not has_core(contents(wheel))
    assert installed(wheel, "pure") == " ".join(["pure", *sorted(cuda_sources())])


def test_a_pure_wheel_is_for_every_machine(sdist: Path, tmp_path: Path) -> None:
    wheel = build_wheel(sdist, tmp_path, CXX="false", DFFORMER_PURE="1")
    assert wheel.name.endswith("-py3-none-any.whl")
    assert not has_core(contents(wheel))


def test_the_sdist_is_small_and_says_what_an_index_shows(sdist: Path) -> None:
    assert sdist.stat().st_size < 2e6
    with tarfile.open(sdist) as archive:
        (info,) = [name for name in archive.getnames() if re.fullmatch(r"[^/]*/PKG-INFO", name)]
        file = archive.extractfile(info)
        assert file is not None
        metadata, _, description = file.read().decode().partition("\n\n")
    assert "Description-Content-Type: text/markdown" in metadata
    assert description.startswith("# dfformer\n")
    linked = re.findall(r"\]\(([^)]*)\)", description)
    assert [target for target in linked if not target.startswith(("https://", "#"))] == []
    assert "![" not in description


def test_the_citation_is_of_this_version() -> None:
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    assert citation["version"] == __version__
    assert citation["preferred-citation"]["title"] in (ROOT / "README.md").read_text(encoding="utf-8")


def test_sources_compiled_at_run_time_are_found_in_a_checkout() -> None:
    assert {Path(name).name for name in run_time_sources()} == set(cuda_sources())
    assert cuda_sources()["butterflies.inl"] == (ROOT / "csrc" / "fft" / "butterflies.inl").read_text(encoding="utf-8")


def test_missing_sources_are_an_error_that_names_the_places(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        sources, "__file__", str(tmp_path.joinpath(*["dfformer_kernels", "backend", "cuda", "sources.py"]))
    )
    with pytest.raises(KernelBuildError, match=re.escape(str(tmp_path / "csrc"))):
        cuda_sources.__wrapped__()
