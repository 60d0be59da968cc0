"""The page of `dfformer show` and `dfformer demo`, in a browser."""

import json
from pathlib import Path

import browser
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure

from dfformer.analysis.figures import full_spectrum
from dfformer.analysis.metrics import mix
from dfformer.analysis.output import MAX_ROWS, Output

NAME = "</script><b>$&'a"  # a file's, which is only text
LAYERS = {(6, 9): 8, (5, 4): 3}  # planes and channels

READ = """
const click = element => element.dispatchEvent(new page.MouseEvent("click", { bubbles: true }));
const set = (i, value) => {
  const input = document.querySelectorAll("input")[i];
  input.value = value;
  input.dispatchEvent(new page.Event("input"));
};
document.body.append(Object.assign(document.createElement("script"), { textContent: "window.layers = data.layers" }));
const magnitudes = [[0, 1, 2], [1, 0, 1]].map(([layer, n, c]) => [...page.mixed(page.layers[layer], n, c)]);
set(0, 1); set(1, 2); set(2, 1);
const shares = [...document.querySelectorAll(".share span")].map(e => e.textContent);
const labels = [...document.querySelectorAll(".sliders span")].map(e => e.textContent);
const heads = [...document.querySelectorAll("th button")];
const column = () => [...document.querySelectorAll("td:nth-child(2)")].map(e => e.textContent);
click(heads[1]);
const rising = column();
click(heads[1]);
const falling = column();
const sorted = heads[1].parentElement.ariaSort;
click(document.querySelector(".cards button"));
await new Promise(resume => setTimeout(resume, 200));
const before = document.querySelector("dialog img").clientWidth;
document.querySelector("dialog").dispatchEvent(new page.KeyboardEvent("keydown", { key: "+" }));
const zoomed = document.querySelector("dialog img").clientWidth / before;
const open = document.querySelector("dialog").open;
click([...document.querySelectorAll("dialog button")].at(-1));
const closed = !document.querySelector("dialog").open;
const unreachable = [...document.querySelectorAll("*")].filter(e => e.onclick && e.tabIndex < 0).length;
const style = page.getComputedStyle(document.body);
const brightness = [style.color, style.backgroundColor].map(text => Number(text.match(/[0-9]+/)[0]));
const bold = document.querySelectorAll("b").length;
return { magnitudes, shares, labels, rising, falling, sorted, zoomed, open, closed, bold, unreachable, brightness,
  title: document.title };
"""


def random_layers() -> dict[str, tuple[torch.Tensor, torch.Tensor | None, tuple[int, int]]]:
    generator = torch.Generator().manual_seed(0)
    return {
        f"stages.{i}.0": (
            torch.view_as_complex(torch.randn(H, W // 2 + 1, 4, 2, generator=generator)),
            torch.randn(2, 4, C, generator=generator).softmax(1),
            (H, W),
        )
        for i, ((H, W), C) in enumerate(LAYERS.items())
    }


@pytest.fixture
def report(tmp_path: Path) -> Path:
    output = Output(tmp_path)
    figure = Figure(figsize=(12, 3))
    figure.subplots().plot([1, 2])
    output.figure("a figure with a name that is much longer than a phone is wide, without an end", figure)
    rows = [(NAME, value, float("nan"), *["a wide cell of a table"] * 9) for value in (10.0, 9.5, -2.0)]
    output.table("numbers", ["name", "value", "none", *map(str, range(9))], rows)
    output.table("long", ["row"], [[row] for row in range(MAX_ROWS + 1)])
    output.filters({NAME: torch.rand(1, 9, 6), "b": torch.rand(3, 300, 200)}, random_layers())
    output.report("filters: a model", ["A fact."])
    return tmp_path / "report.html"


def test_it_needs_nothing_else(report: Path) -> None:
    text = report.read_text(encoding="utf-8")
    assert "http" not in text.replace("http-equiv", "")
    assert NAME not in text
    data = json.loads(text.split('id="data">')[1].split("</script>")[0])
    assert [table["name"] for table in data["tables"]] == ["numbers"], "longer ones are in their CSV only"
    assert {path.name for path in report.parent.glob("*.csv")} == {"numbers.csv", "long.csv"}


def test_a_table_of_files_whose_names_are_not_unicode(tmp_path: Path) -> None:
    Output(tmp_path).table("images", ["image", "share"], [("caf\udce9.png", 1 / 3)])
    assert (tmp_path / "images.csv").read_bytes() == b"image,share\r\ncaf\\udce9.png,0.333333333\r\n"


@pytest.mark.parametrize(("width", "dark"), [(390, False), (1400, True)])
def test_in_a_browser(report: Path, width: int, dark: bool) -> None:
    found = browser.inspect(report, width, READ, dark=dark)
    ink, paper = found["brightness"]
    assert ink - paper > 150 if dark else paper - ink > 150
    assert found["unreachable"] == 0, "by keyboard"
    for shown, (i, n, c) in zip(found["magnitudes"], ((0, 1, 2), (1, 0, 1)), strict=True):
        basis, shares, (_, W) = list(random_layers().values())[i]
        assert shares is not None
        expected = np.abs(full_spectrum(mix(shares, basis)[n, ..., c], W))
        np.testing.assert_allclose(shown, expected.ravel(), rtol=1e-5)
    _, shares, _ = random_layers()["stages.1.0"]
    assert shares is not None
    assert found["shares"] == [f"filter {f}: {100 * shares[1, f, 2]:.1f} %" for f in range(4)]
    assert found["labels"] == ["layer: stages.1.0", "channel: 2", "image: b"]
    assert (found["rising"], found["falling"]) == (["-2", "9.5", "10"], ["10", "9.5", "-2"])
    assert found["sorted"] == "descending"
    assert found["open"]
    assert found["closed"]
    assert found["zoomed"] == pytest.approx(1.25, abs=0.02)
    assert (found["title"], found["bold"]) == ("filters: a model", 0)
