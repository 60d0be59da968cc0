"""Where ``dfformer predict`` writes: no result costs anybody a file, no two have the same name."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from image_files import READABLE, noise, write_all

from dfformer.cli.main import main
from dfformer.tasks import detection
from dfformer.tasks.results import result_names

TASKS = ["classify", "segment", "detect"]
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning"),
]


TARGETS: dict[str, tuple[str, list[str]]] = {
    "images": ("segment", ["--output", "images"]),
    "link": ("segment", ["--output", "link"]),
    "hard-link": ("segment", ["--output", "hard_link"]),
    "somebody-else's": ("segment", ["--output", "theirs"]),
    "file": ("segment", ["--output", "file"]),
    "json-is-an-image": ("segment", ["--output", "new", "--json", "images/a.png"]),
    "json-is-another-image": ("segment", ["--output", "new", "--json", "theirs/a.png"]),
    "detections-images": ("detect", ["--output", "images"]),
    "somebody-else's-detections": ("detect", ["--output", "detected"]),
    "json-is-the-detections": ("detect", ["--output", "new", "--json", "new/detections.json"]),
}


@pytest.mark.parametrize(("task", "arguments"), TARGETS.values(), ids=TARGETS.keys())
def test_no_file_is_overwritten(
    task: str,
    arguments: list[str],
    checkpoints: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    plain = READABLE["plain.png"]
    write_all(Path("images"), {"a.png": plain, "b.png": plain})
    write_all(Path("theirs"), {"a.png": lambda path: noise(seed=9).save(path)})
    write_all(Path("detected"), {"detections.json": lambda path: path.write_text('[{"image_id": 1}]')})
    write_all(Path("hard_link"), {"a.png": lambda path: path.hardlink_to("images/a.png")})
    write_all(Path(), {"link": lambda path: path.symlink_to("images"), "file": lambda path: path.write_text("")})
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert main(["predict", "--checkpoint", checkpoints[task], *arguments, "images"]) == 2
    assert arguments[-2] + ": " in capsys.readouterr().err
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize("task", TASKS[1:])
def test_a_second_run_replaces_its_own_results_and_predicts_none_of_them(
    task: str, run: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    write_all(tmp_path / "images", {"a.png": READABLE["plain.png"]})
    reports = []
    for _ in range(2):
        status, report = run(task, [tmp_path / "images"], "--output", str(tmp_path / "images" / "out"))
        assert status == 0
        reports.append(report)
    assert reports[0] == reports[1]


NAMES: dict[str, tuple[list[str], list[str], list[str]]] = {
    "different": (["x/a.png", "y/b.png"], ["", "_picture"], ["a", "b"]),
    "suffixes": (["a.png", "a.jpg"], [""], ["a.png", "a.jpg"]),
    "folders": (["x/1.png", "y/1.png"], [""], ["x_1", "y_1"]),
    "endings": (["a.png", "a_picture.png"], ["", "_picture"], ["a.png", "a_picture.png"]),
    "only some": (["x/1.png", "y/1.png", "y/2.png"], [""], ["x_1", "y_1", "2"]),
    "case": (["x/A.png", "y/a.png"], [""], ["x_A", "y_a"]),
    "forms": (["x/\u00e9.png", "y/e\u0301.png"], [""], ["x_\u00e9", "y_e\u0301"]),
    "joined": (["a/b_c.png", "a_b/c.png", "x/c.png", "y/b_c.png"], [""], ["", "", "", ""]),
    "nothing helps": (["A.png", "a.png"], [""], ["0_A", "1_a"]),
    "absolute": (["/x/1.png", "/y/1.png"], [""], ["x_1", "y_1"]),
}


@pytest.mark.parametrize(("paths", "endings", "names"), NAMES.values(), ids=NAMES.keys())
def test_names_of_results(paths: list[str], endings: list[str], names: list[str]) -> None:
    found = result_names([Path(path) for path in paths], endings)
    if len(set(names)) == len(names):
        assert found == names
    written = {(name + ending).casefold() for name in found for ending in endings}
    assert len(written) == len(paths) * len(endings)


@pytest.mark.parametrize(("task", "endings"), [("segment", ["", "_picture"]), ("detect", [""])])
def test_images_of_the_same_name(
    task: str, endings: list[str], run: Callable[..., tuple[int, Any]], tmp_path: Path
) -> None:
    for folder in ("x", "y"):
        write_all(tmp_path / folder, {"1.png": READABLE["plain.png"]})
    assert run(task, [tmp_path / "x", tmp_path / "y" / "1.png", tmp_path / "x" / "1.png"])[0] == 0
    written = {path.name for path in (tmp_path / "out").iterdir()} - {"detections.json"}
    assert written == {f"{folder}_1{ending}.png" for folder in "xy" for ending in endings}


def test_ids_of_images() -> None:
    """Numbers where COCO's files are named by them, never the same for two images."""
    ids = detection._image_ids([Path(name) for name in ("a/000012.jpg", "7.png", "b/007.png", "x.png", "\u0663.png")])
    assert list(ids.values()) == [12, "7", "007", "x", "\u0663"]
