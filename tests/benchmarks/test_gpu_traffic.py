"""The tables of docs/gpu.md say what the code says."""

import csv
from itertools import product
from pathlib import Path

import gpu_resources
import gpu_traffic
import pytest
import torch
from cufft_traffic import traffic
from paths import ROOT

from dfformer_kernels.backend.cuda import layout as cuda
from dfformer_kernels.backend.cufft import passes as cufft

PAGE = (ROOT / "docs/gpu.md").read_text(encoding="utf-8")


def cells(first: str, number: int = 0) -> list[str]:
    """Of the ``number``-th row of a table after the one that begins with ``first``."""
    lines = PAGE.splitlines()
    begin = next(i for i, line in enumerate(lines) if line.startswith(f"| {first}"))
    return [cell.strip() for cell in lines[begin + number].strip("|").split("|")]


def test_operators_are_counted_by_what_they_read_and_write() -> None:
    x = torch.empty(10, 6, device="meta")
    with gpu_traffic.MovedBytes() as moved:
        torch.add(x.view(60)[:60], x.t().reshape(60))  # two views, a copy (2 x), a sum (3 x)
    assert moved.total == 5 * x.nbytes


def test_what_a_compiler_makes_one_kernel() -> None:
    x, w = torch.empty(8, 4, device="meta"), torch.empty(4, 4, device="meta")
    with gpu_traffic.Calls() as recorded:
        a = x * 2  # 2 x
        b = a + x  # 3 x
        y = b @ w  # 2 x + w
    assert [size for _, size in gpu_traffic.eager(recorded.calls)] == [
        2 * x.nbytes,
        3 * x.nbytes,
        2 * x.nbytes + w.nbytes,
    ]
    kept = {id(y.untyped_storage())}
    # a is never in memory
    assert [*gpu_traffic.compiled(recorded.calls, kept)] == [
        ("all else", 2 * x.nbytes),
        ("matrix products", 2 * x.nbytes + w.nbytes),
    ]


def test_the_table_of_whole_models() -> None:
    with gpu_traffic.RESULTS.open(newline="", encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row["dtype"] == "bfloat16"]
    columns = [*product(gpu_traffic.MODELS, ("inference", "training"))]

    def gigabytes(mode: str, column: int, kind: str = "") -> str:
        of = [r for r in rows if r["mode"] == mode and (r["model"], r["direction"]) == columns[column]]
        return f"{sum(float(r['gigabytes']) for r in of if kind in r['kind']):.1f}"

    assert cells("eager")[1:] == [gigabytes("eager", column) for column in range(4)]
    assert cells("compiled")[1:] == [gigabytes("compiled", column) for column in range(4)]
    for number, kind in enumerate(("filter steps", "StarReLU", "matrix products"), start=1):
        assert cells("compiled", number)[1:3] == [gigabytes("compiled", column, kind) for column in range(2)]


def test_a_model_is_counted_whole() -> None:
    rows = [*gpu_traffic.model_rows("dfformer_s18", torch.bfloat16, training=False, batch=1)]
    [eager, compiled] = [row for row in rows if row.kind == "filter steps"]
    assert eager.kernels == compiled.kernels == 18
    # x and y in bfloat16 of 3, 3, 9 and 3 blocks, and the small rest
    moved = 4 * (3 * 56**2 * 64 * 2 + 3 * 28**2 * 128 * 2 + 9 * 14**2 * 320 * 2 + 3 * 7**2 * 512 * 2)
    assert moved < 1e9 * eager.gigabytes < 2 * moved
    assert sum(row.gigabytes for row in rows if row.mode == "compiled") < sum(
        row.gigabytes for row in rows if row.mode == "eager"
    )


@pytest.mark.parametrize("side", [56, 28, 14, 7, 64, 96, 128])
@pytest.mark.parametrize("backward", [False, True])
def test_the_table_of_resources(side: int, backward: bool) -> None:
    _, _, *given = cells(f"{side}x{side}, ", backward)
    C = int(cells(f"{side}x{side}, ")[0].partition(", ")[2])
    direction = gpu_resources.DIRECTIONS[backward]
    for arch, cell in zip(("sm_80", "sm_89", "sm_90"), given, strict=True):
        problem = ("cuda", f"filter_{direction}, C={C}", arch, str(side), "float32")
        row = next(
            row
            for row in gpu_resources.read()
            if tuple(row[name] for name in ("backend", "kernel", "target", "H", "dtype")) == problem
        )
        step = cuda.KernelSpec(side, side, C, gpu_resources.F, torch.float32, True, backward)
        variant = cuda.choose_variant(step, cuda.CHIPS[arch])
        if variant is None:
            assert cell == "refused"
            continue
        size = f"{variant.shared_bytes / 1024:.0f} KiB"
        assert cell == f"{variant.channels_per_cta} x {variant.threads}, {row['regs']}, {size}, {row['ctas_per_sm']}"


def test_what_the_page_says_of_the_committed_table() -> None:
    rows = [row for row in gpu_resources.read() if row["backend"] == "cuda"]
    assert f"{sum(row['dispatched'] == 'True' for row in rows)} of {len(rows)} combinations dispatched" in PAGE
    of_plane: dict[tuple[str, ...], list[tuple[int, int, int]]] = {}
    for row in rows:
        if row["dispatched"] == "True":
            problem = tuple(row[name] for name in ("target", "H", "W", "dtype", "direction"))
            numbers = int(row["regs"]), int(row["smem_bytes"]), int(row["ctas_per_sm"])
            of_plane.setdefault(problem, []).append(numbers)
    apart = [[max(numbers) - min(numbers) for numbers in zip(*kernels, strict=True)] for kernels in of_plane.values()]
    registers, shared, ctas = map(max, zip(*apart, strict=True))
    assert (shared, ctas) == (0, 0)
    assert f"differ by up to {registers} registers, which leaves as many CTAs resident." in PAGE.replace("\n", " ")


@pytest.mark.parametrize("column", range(4))
def test_the_table_of_passes(column: int) -> None:
    shape, dtype, backward = gpu_traffic.SHAPES[0], gpu_traffic.DTYPES[column % 2], column >= 2
    passes = traffic("dynamic_filter", shape, dtype, star_relu=True, backward=backward)
    elements = torch.Size(shape).numel()
    moved = [f"{size / elements:.1f}" for _, size in passes]
    if backward:
        inside, transform, *rest = moved[:2] + moved[4:]
        assert moved[2:4] == [inside, transform]
        moved = [f"2 x {inside}", f"2 x {transform}", *rest]
    assert [cells("in: ", i)[2 + column] for i in range(5)] == moved
    total = gpu_traffic.bytes_per_element("cufft", shape, dtype, backward)
    assert cells("**together**")[2 + column].startswith(f"**{total:.1f}**, {len(passes)}")


def test_what_the_page_says_of_large_samples(monkeypatch: pytest.MonkeyPatch) -> None:
    def moved(backward: bool) -> float:
        return gpu_traffic.bytes_per_element("cufft", gpu_traffic.LARGE, torch.float32, backward)

    a, c = (f"{moved(backward):.1f}" for backward in (False, True))
    monkeypatch.setattr(cufft, "_LAUNCH_BYTES", 2**60)
    b, d = (f"{moved(backward):.1f}" for backward in (False, True))
    words = f"{a} bytes per element forward instead of {b}, and {c} instead of {d} backward"
    assert words in " ".join(PAGE.split())


def test_what_the_page_says_of_torch() -> None:
    for backward, words in ((False, "75 to 88 bytes forward"), (True, "218 to 259 backward")):
        moved = [gpu_traffic.bytes_per_element("torch", shape, torch.float32, backward) for shape in gpu_traffic.SHAPES]
        assert words.startswith(f"{min(moved):.0f} to {max(moved):.0f}")
        assert words in " ".join(PAGE.split())


def test_the_picture_is_drawn(tmp_path: Path) -> None:
    gpu_traffic.draw(tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
