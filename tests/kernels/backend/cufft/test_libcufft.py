"""cuFFT's transforms by libcufft: values, bad input, and where the library is found.

On a fake library, and on a GPU against torch.fft.
"""

import ctypes
import sys
from pathlib import Path

import pytest
import torch
from conftest import require
from fake_cufft import DTYPES, EXECUTE, Fake, kept_plans, library_plans, planes, spectra
from torch import Tensor

from dfformer_kernels.backend.cufft import libcufft
from dfformer_kernels.backend.cufft.plans import Plans, PlanSpec
from dfformer_kernels.tolerance import BOUND, relative_error

SHAPES = [
    (1, 1, 1),
    (1, 1, 5),
    (1, 2, 3),
    (2, 1, 3),
    (1, 16, 2),
    (16, 1, 2),
    (5, 1, 1),
    (1, 13, 4),
    (7, 7, 8),
    (8, 8, 1),
    (6, 9, 5),
    (9, 6, 5),
    (11, 13, 3),
    (14, 14, 8),
    (12, 20, 3),
    (31, 4, 2),
    (28, 28, 3),
    (56, 56, 1),
]


@pytest.fixture(params=["fake", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> torch.device:
    """Where a test's tensors are: host memory with the fake library, or a GPU with the real one."""
    if request.param == "cuda":
        require("cuda", not libcufft.unavailable_reasons(), "; ".join(libcufft.unavailable_reasons()))
        return torch.device("cuda", torch.cuda.current_device())
    request.getfixturevalue("fake")
    return torch.device("cpu")


# Layouts


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_transforms_agree_with_their_definition(
    shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> None:
    u = planes(shape, dtype)
    Z = libcufft.rfft2(u.to(device))
    assert Z.device == device
    assert relative_error(Z, spectra(u.double())) <= BOUND[dtype]
    back = libcufft.irfft2(spectra(u).to(device), shape[1])
    assert back.dtype == dtype
    assert relative_error(back, u.double() * shape[0] * shape[1]) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_sample_inside_a_batch_needs_no_copy_unless_it_is_not_aligned(
    dtype: torch.dtype, device: torch.device
) -> None:
    """x[b] of odd size begins at an odd element for odd b, which the library would refuse."""
    x = torch.stack([planes((3, 5, 7), dtype, seed) for seed in range(4)])
    for b in range(4):
        assert relative_error(libcufft.rfft2(x.to(device)[b]), spectra(x[b].double())) <= BOUND[dtype]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_each_of_several_arrays_is_a_transform(dtype: torch.dtype, fake: Fake) -> None:
    u = torch.stack([planes((6, 9, 5), dtype, seed) for seed in range(4)]).view(2, 2, 6, 9, 5)
    Z = libcufft.rfft2(u)
    back = libcufft.irfft2(Z.clone(), 9)
    for i, j in ((0, 0), (0, 1), (1, 0), (1, 1)):
        assert relative_error(Z[i, j], spectra(u[i, j].double())) <= BOUND[dtype]
    assert relative_error(back / 54, u) <= BOUND[dtype]
    assert [fake.calls(EXECUTE[dtype, inverse]) for inverse in (False, True)] == [4, 4]
    assert fake.live_plans == 2


@pytest.mark.usefixtures("fake")
def test_several_arrays_of_an_odd_size_are_refused() -> None:
    for transform in (
        lambda: libcufft.rfft2(torch.zeros(2, 3, 5, 7)),
        lambda: libcufft.irfft2(torch.zeros(2, 3, 3, 7, 2), 5),
    ):
        with pytest.raises(ValueError, match=r"of 2 real arrays \(3, 5, 7\) every second one begins at an odd element"):
            transform()


def test_the_input_of_rfft2_stays_as_it_is(device: torch.device) -> None:
    u = planes((6, 10, 4), torch.float32)
    on_device = u.to(device)
    libcufft.rfft2(on_device)
    assert torch.equal(on_device.cpu(), u)


@pytest.mark.parametrize("shape", [(6, 8, 3), (7, 9, 2), (5, 1, 2)], ids=str)
def test_spectra_of_real_planes_do_not_depend_on_what_a_library_does_with_others(
    shape: tuple[int, int, int], fake: Fake
) -> None:
    Z = spectra(planes(shape, torch.float64))
    other = Z.clone()
    other[1:, 0, :, 1] += 1.0  # column k = 0 is no longer conjugate to itself
    results = []
    for mixes in (False, True):
        fake.library.fake_cufft_mix_imaginary_parts(mixes)
        results.append([libcufft.irfft2(z.clone(), shape[1]) for z in (Z, other)])
    (real, dropped), (real_mixed, mixed) = results
    assert relative_error(real_mixed, real) <= BOUND[torch.float64]
    assert relative_error(mixed, dropped) > 1e-3


# Bad input


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("u", "given"),
    [
        (torch.zeros(4, 4), r"\(4, 4\)"),
        (torch.zeros(4, 4, 0), r"\(4, 4, 0\)"),
        (torch.zeros(4, 4, 2, dtype=torch.bfloat16), "bfloat16"),
        (torch.zeros(4, 4, 2, dtype=torch.complex64), "complex64"),
        (torch.zeros(2, 4, 4).permute(1, 2, 0), r"strides \(4, 1, 16\)"),
        (torch.zeros(4, 4, 2, device="meta"), "on meta"),
    ],
    ids=lambda value: value if isinstance(value, str) else "u",
)
def test_rfft2_takes_dense_planes_only(u: Tensor, given: str) -> None:
    with pytest.raises(
        ValueError, match=rf"libcufft: u: expected contiguous \(\.\.\.,H,W,N\) float32 or float64 .*got.*{given}"
    ):
        libcufft.rfft2(u)


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("shape", "W"), [((4, 3, 2, 2), 6), ((4, 3, 2, 2), 3), ((4, 3, 2), 4), ((4, 3, 2, 1), 4), ((4, 1, 2, 2), 0)]
)
def test_irfft2_takes_the_spectra_of_planes_that_wide(shape: tuple[int, ...], W: int) -> None:
    with pytest.raises(ValueError, match=rf"Z: expected contiguous \(\.\.\.,H,K,N,2\), K = {W}//2 \+ 1,"):
        libcufft.irfft2(torch.zeros(shape), W)


# Finding the library


def test_a_library_that_is_not_there_or_another_one_is_refused() -> None:
    with pytest.raises(OSError, match=r"/nowhere/libcufft\.so"):
        Plans("/nowhere/libcufft.so")
    libc = next(name for name in ("libc.so.6", "libSystem.dylib", "libc.so") if _can_load(name))
    with pytest.raises(AttributeError, match=f"{libc} has no function cufftCreate"):
        Plans(libc)


def _can_load(name: str) -> bool:
    try:
        ctypes.CDLL(name)
    except OSError:
        return False
    return True


@pytest.mark.usefixtures("fake")
@pytest.mark.parametrize(
    ("version", "candidates", "reason"),
    [
        (None, [], "this torch is not built for CUDA"),
        ("99.1", [], "which libcufft belongs to CUDA 99 is not known, only to CUDA 12 and 13"),
        ("12.8", ["/nowhere/a.so", "/nowhere/b.so"], r"libcufft cannot be opened: /nowhere/a.so: .*, /nowhere/b.so: "),
    ],
)
def test_there_is_a_reason_where_there_is_no_library(
    version: str | None, candidates: list[str], reason: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.version, "cuda", version)
    monkeypatch.setattr(libcufft, "_candidates", lambda soname: candidates)
    libcufft._open.cache_clear()
    for transform in (
        lambda: libcufft.rfft2(torch.zeros(2, 2, 1)),
        lambda: libcufft.irfft2(torch.zeros(2, 2, 1, 2), 2),
    ):
        with pytest.raises(RuntimeError, match=reason):
            transform()
    assert len(libcufft.unavailable_reasons()) == 1


def test_the_soname_is_tried_before_the_copies_in_wheels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    library = tmp_path / "nvidia" / "cu13" / "lib" / "libcufft.so.12"
    library.parent.mkdir(parents=True)
    library.touch()
    library.with_name("libcufft.so.11").touch()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    for name in [name for name in sys.modules if name.split(".")[0] == "nvidia"]:
        monkeypatch.delitem(sys.modules, name)
    assert libcufft._candidates("libcufft.so.12") == ["libcufft.so.12", str(library)]


def test_torchs_own_libcufft_opens_and_says_what_it_lacks_without_a_driver() -> None:
    require("cuda", torch.backends.cuda.is_built(), "this torch is not built for CUDA")
    if torch.cuda.is_available():
        pytest.skip("there is a driver")
    assert libcufft.unavailable_reasons() == []
    with pytest.raises(RuntimeError, match=r"^cufftCreate returned CUFFT_[A-Z_]+ for rfft2 of float32 8x8 planes, N=4"):
        library_plans().get(PlanSpec(0, (8, 8, 4), torch.float32, inverse=False))
    assert kept_plans(0) == 0
