"""Figures do not exaggerate: no offsets, no range narrower than what is meaningful, no ticks between frequencies."""

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib import cbook
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.text import Text
from torch import Tensor

from dfformer.analysis import figures
from dfformer.analysis.metrics import Spectrum, entropy

NAMES = ["a", "b", "c"]


def alike(*shape: int, around: float = 1.0, by: float = 1e-4) -> Tensor:
    """Values that differ by next to nothing."""
    return around + by * torch.rand(shape, generator=torch.Generator().manual_seed(0))


def basis(H: int, K: int, W: int) -> Figure:
    return figures.filter_basis(alike(H, K, 3).to(torch.complex64), W, NAMES)


def mixed(H: int, K: int, W: int) -> Figure:
    filters = alike(3, H, K, 2).to(torch.complex64)
    return figures.mixed_filters([np.ones((4, 4))] * 3, NAMES, filters, [0, 5], W)


def routing(filters: int, around: float = 0.0) -> Figure:
    logits = around * torch.randn(3, filters, 16) + alike(3, filters, 16, by=2e-3)
    shares = logits.softmax(1)
    return figures.routing(shares, entropy(shares), NAMES, "class")


def spectra(points: int) -> Figure:
    found = {name: Spectrum(torch.linspace(0, 1, points), alike(points, around=0.0)) for name in NAMES}
    return figures.spectra_by_depth(found)


def similarity() -> Figure:
    return figures.similarity_matrix(alike(3, 3, around=0.9998), [NAMES, NAMES], ["m", "m"])


def receptive(H: int, W: int) -> Figure:
    return figures.receptive_fields({"m": alike(H, W).double()})


def curve(values: list[float]) -> Figure:
    return figures.learning_curve([0.5] * len(values), values)


DRAWN: dict[str, Callable[[], Figure]] = {
    "basis": lambda: basis(14, 8, 14),
    "basis-2x2": lambda: basis(2, 2, 2),
    "basis-1x3": lambda: basis(1, 2, 3),
    "mixed": lambda: mixed(6, 4, 6),
    "routing": lambda: routing(4),
    "routing-of-one": lambda: routing(1),
    "spectra": lambda: spectra(5),
    "spectra-of-1x1": lambda: spectra(1),
    "similarity": similarity,
    "receptive-2x2": lambda: receptive(2, 2),
    "curve": lambda: curve([0.98123, 0.98124, 0.98125]),
    "curve-of-one": lambda: curve([1.0]),
    "curve-of-zeros": lambda: curve([0.0, 0.0]),
}


def axes_of(figure: Figure) -> Iterator[tuple[Axes, Any]]:
    figure.draw_without_rendering()
    for ax in figure.axes:
        yield from ((ax, ax.xaxis), (ax, ax.yaxis))


@pytest.mark.parametrize("draw", DRAWN.values(), ids=DRAWN.keys())
def test_no_offsets(draw: Callable[[], Figure]) -> None:
    figure = draw()
    for _, axis in axes_of(figure):
        assert axis.get_offset_text().get_text() == ""
    labels = [label.get_text() for _, axis in axes_of(figure) for label in axis.get_ticklabels()]
    assert any(labels)
    assert max(map(len, labels)) <= 16


def colours(figure: Figure) -> list[tuple[float, float]]:
    """The colour ranges of its images that have one of their own."""
    return [
        image.get_clim()
        for ax in figure.axes
        for image in ax.images
        if isinstance(drawn := image.get_array(), np.ndarray) and drawn.ndim == 2
    ]


def label_range(figure: Figure, label: str, axis: str) -> tuple[float, float]:
    [ax] = [ax for ax in figure.axes if getattr(ax, f"get_{axis}label")() == label]
    low, high = getattr(ax, f"get_{axis}lim")()
    return low, high


def test_colours_of_filters_that_are_alike() -> None:
    magnitudes = [r for r in colours(basis(14, 8, 14)) if r != pytest.approx((-math.pi, math.pi))]
    assert all(high - low >= 1 - 1e-9 and low < 0 < high for low, high in magnitudes)
    gains = [r for r in colours(mixed(6, 4, 6)) if r[0] == -r[1]]
    assert set(gains) == {(-1.0, 1.0)}


def test_colours_of_shares() -> None:
    """Even shares are white and nearly even ones nearly; a share is never below 0."""
    assert colours(routing(4)) == [pytest.approx((0.125, 0.375), abs=1e-3)] * 4
    for low, high in colours(routing(4, around=3.0)):
        assert low == 0
        assert 0.9 < high <= 1
    image = routing(4).axes[0].images[0]
    red, _, blue, _ = image.to_rgba(np.array([[0.2495, 0.25, 0.2505]]))[0].T
    assert np.abs(red - blue).max() < 0.05


@pytest.mark.parametrize("filters", [1, 2, 4])
def test_entropy_ends_where_all_are_alike(filters: int) -> None:
    low, high = label_range(routing(filters), "entropy of the shares (bits)", "x")
    assert high - low >= 0.5
    assert high >= math.log2(filters)


def test_ranges_of_axes() -> None:
    low, high = label_range(curve([0.98, 0.98001]), "accuracy (%)", "y")
    assert high - low >= 10
    assert label_range(curve([1.0]), "accuracy (%)", "y")[1] == pytest.approx(100.5)
    assert label_range(curve([0.0]), "accuracy (%)", "y")[0] == pytest.approx(-0.5)
    for label in ("Δ log amplitude", "Δ log amplitude, highest frequency"):
        low, high = label_range(spectra(5), label, "y")
        assert high - low >= 1
    assert colours(similarity()) == [(0.5, 1)]


@pytest.mark.parametrize(("H", "W"), [(2, 2), (1, 3), (3, 1), (14, 9)])
def test_ticks_are_frequencies_that_exist(H: int, W: int) -> None:
    for ax, axis in axes_of(basis(H, W // 2 + 1, W)):
        if ax.images:
            low, high = sorted(axis.get_view_interval())
            shown = [tick for tick in axis.get_ticklocs() if low <= tick <= high]
            assert shown
            assert all(tick == round(tick) for tick in shown)
            assert all(-(max(H, W) // 2) <= tick <= max(H, W) // 2 for tick in shown)


def test_constant_responses_are_grey() -> None:
    x = torch.randn(6, 6)
    rounding = torch.full((6, 6), 3.0) + 1e-7 * x
    figure = figures.responses([[x, 0.1 * x, rounding], [rounding, x, x]], NAMES[:2], NAMES)
    titles = [ax.get_title() for ax in figure.axes[:6]]
    assert titles == ["a", "b\n-20 dB", "c\nconstant", "constant", "constant", "constant"]
    assert not np.any(figure.axes[2].images[0].get_array())
    assert np.any(figure.axes[4].images[0].get_array())


def test_at_least() -> None:
    def found(values: list[float], *rest: float) -> Any:
        return pytest.approx(figures.at_least(np.array(values), *rest))

    assert found([0.5, 0.5], 1.0) == (0.0, 1.0)
    assert found([-3.0, 4.0, float("nan")], 1.0) == (-3.0, 4.0)
    assert found([99.0, 99.5], 10.0, 0.0, 100.0) == (90.0, 100.0)
    assert found([0.0, 1.0], 10.0, 0.0, 100.0) == (0.0, 10.0)
    assert found([float("inf")], 1.0) == (-0.5, 0.5)


@pytest.mark.parametrize("name", ["a$b$c", "$\\frac$", "cost: 5$", "$$"])
def test_dollars_in_names(name: str) -> None:
    """Are no formulas."""
    shares = alike(2, 4, 8, around=0.25, by=0)
    field = alike(4, 4).double()
    drawn = [
        figures.titled(figures.routing(shares, entropy(shares), [name, name], "class"), name, name),
        figures.mixed_filters([np.ones((4, 4))] * 2, [name] * 2, alike(2, 2, 2, 1).to(torch.complex64), [0], 2),
        figures.responses([[field, field]], [name], ["input", "filter"]),
        figures.receptive_fields({name: field}),
        figures.similarity_matrix(alike(2, 2), [["a", "b"]] * 2, [name, name]),
        figures.predictions_grid(alike(2, 4, 4), [name, name], [name, "other"], [1.0, 0.5]),
    ]
    for figure in drawn:
        figure.draw_without_rendering()
        texts = [text for text in figure.findobj(Text) if name.replace("$", r"\$") in text.get_text()]
        assert texts
        assert all(cbook.is_math_text(text.get_text()) is False for text in texts)


def test_numbers_on_bars_are_without_exponents() -> None:
    figure = figures.comparison_bars([("a", 2028.4, 75.25), ("b", 0.5, 172.4)], ("first", "second"), "ms", "times")
    assert [text.get_text() for text in figure.axes[0].texts] == ["2028", "0.5", "75.2", "172"]
