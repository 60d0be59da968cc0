"""Forms of the filter step: channels first, routing weights, a filter a sample, groups of channels, real bases."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from cases import DTYPES, LAYOUTS, TARGETS, assert_within_bound
from conftest import require_backend, require_compiler
from extent import pairwise
from native_core import ISAS
from torch import Tensor

from dfformer_kernels import dispatch, dynamic_filter, global_filter
from dfformer_kernels.backend import cpu
from dfformer_kernels.backend.cuda import layout
from dfformer_kernels.backend.filter_kernels import FilterStep
from dfformer_kernels.problem import Problem

pytestmark = pytest.mark.usefixtures("one_thread")
B, C, G = 2, 12, 3
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Form:
    """How the step is called, its parameters' shapes, and what they make of (B,H,K,C) in complex numbers."""

    function: Callable[..., Tensor]
    shapes: Callable[[int, int], list[Shape]]
    mixed: Callable[..., Tensor]
    options: dict[str, Any] = field(default_factory=dict)


def as_complex(basis: Tensor) -> Tensor:
    return torch.view_as_complex(basis) if basis.shape[-1] == 2 else torch.complex(basis, 0 * basis)


def per_filter(weights: Tensor, basis: Tensor) -> Tensor:
    M = as_complex(basis)
    return torch.einsum("bfc,hkf->bhkc", weights.to(M.dtype), M)


def by_group(weights: Tensor, basis: Tensor) -> Tensor:
    return torch.cat([per_filter(w, b) for w, b in zip(weights.chunk(len(basis), 2), basis, strict=True)], -1)


def routed(logits: Tensor, basis: Tensor) -> Tensor:
    return per_filter(logits.softmax(1), basis)


def dynamic(filters: int, *groups: int, pairs: Shape = (2,)) -> Callable[[int, int], list[Shape]]:
    return lambda H, K: [(B, filters, C), (*groups, H, K, filters, *pairs)]


WEIGHTS: dict[str, Any] = {"normalization": None}
FORMS = {
    "softmax": Form(dynamic_filter, dynamic(5), routed),
    "weights": Form(dynamic_filter, dynamic(4), per_filter, WEIGHTS),
    "real_basis": Form(dynamic_filter, dynamic(3, pairs=()), routed),
    "many_filters": Form(dynamic_filter, dynamic(64), routed),
    "groups": Form(dynamic_filter, dynamic(4, G), lambda logits, basis: by_group(logits.softmax(1), basis)),
    "groups_of_weights": Form(dynamic_filter, dynamic(2, G), by_group, WEIGHTS),
    "weight": Form(global_filter, lambda H, K: [(H, K, C, 2)], as_complex),
    "weight_per_sample": Form(global_filter, lambda H, K: [(B, H, K, C, 2)], as_complex),
}
ALL_FORMS = pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
BACKENDS = [t.backend for t in TARGETS if (t.op_name, t.device) == ("dynamic_filter", "cpu")]


def make(form: Form, plane: tuple[int, int], dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """x (B,H,W,C) and parameters."""
    generator = torch.Generator().manual_seed(0)
    H, W = plane
    x = torch.randn((B, H, W, C), generator=generator).to(dtype)
    return x, [0.5 * torch.randn(shape, generator=generator) for shape in form.shapes(H, W // 2 + 1)]


def definition(form: Form, x: Tensor, parameters: list[Tensor], scale: Tensor, bias: Tensor) -> Tensor:
    u = scale * x.relu().square() + bias
    Z = torch.fft.rfft2(u, dim=(1, 2)) * form.mixed(*parameters)
    return torch.fft.irfft(torch.fft.ifft(Z, dim=1), n=x.shape[2], dim=2)


def assert_correct(form: Form, x: Tensor, parameters: list[Tensor], backend: str, channels_first: bool) -> None:
    """Results and gradients, in the memory format that was given."""
    scalars = [torch.tensor(0.9), torch.tensor(0.3)]
    leaves = [t.detach().requires_grad_() for t in (x, *parameters, *scalars)]
    exact = [t.detach().double().requires_grad_() for t in leaves]
    wanted = definition(form, exact[0], exact[1:-2], *exact[-2:])
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(1))
    grad_y = (wanted.detach() + 0.5 * noise).to(x.dtype)
    if channels_first:
        leaves[0] = x.permute(0, 3, 1, 2).contiguous().requires_grad_()
    format_ = "channels_first" if channels_first else "channels_last"
    y = form.function(*leaves[:-2], tuple(leaves[-2:]), data_format=format_, backend=backend, **form.options)
    gradients = list(torch.autograd.grad(y, leaves, grad_y.permute(0, 3, 1, 2) if channels_first else grad_y))
    assert y.is_contiguous()
    assert gradients[0].is_contiguous()
    if channels_first:
        y, gradients[0] = y.permute(0, 2, 3, 1), gradients[0].permute(0, 2, 3, 1)
    wanted_gradients = torch.autograd.grad(wanted, exact, grad_y.double())
    for name, a, w in zip("yxpqsb"[: 1 + len(leaves)], (y, *gradients), (wanted, *wanted_gradients), strict=True):
        assert_within_bound(name, a, w)


@pytest.mark.parametrize("channels_first", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
@ALL_FORMS
def test_every_form(form: Form, backend: str, channels_first: bool) -> None:
    require_backend(backend)
    x, parameters = make(form, (6, 7))
    assert_correct(form, x, parameters, backend, channels_first)


# Rows that are shorter than half a register, shorter than one, several with a rest; a row without a partner
PLANES = [(7, 7), (14, 13), (3, 40), (33, 32), (1, 9), (9, 1)]


@pytest.mark.parametrize(**pairwise(isa=ISAS, plane=PLANES, dtype=DTYPES))
def test_channels_first_on_every_instruction_set(isa: str, plane: tuple[int, int], dtype: torch.dtype) -> None:
    form = FORMS["softmax"]
    x, parameters = make(form, plane, dtype)
    if dtype == torch.float64:
        parameters = [p.double() for p in parameters]
    x = torch.cat([x, x], -1)[..., :17]  # one channel more than a register has
    parameters[0] = torch.cat([parameters[0]] * 2, -1)[..., :17]
    assert_correct(form, x, parameters, "cpu", True)


def test_channels_first_has_the_bits_of_channels_last() -> None:
    require_backend("cpu")
    x, (logits, basis) = make(FORMS["softmax"], (14, 14))
    y = dynamic_filter(x, logits, basis).permute(0, 3, 1, 2)
    for memory in (torch.contiguous_format, torch.channels_last):
        planes = x.permute(0, 3, 1, 2).contiguous(memory_format=memory)
        assert torch.equal(dynamic_filter(planes, logits, basis, data_format="channels_first"), y)


def test_neither_memory_format_of_x_is_copied() -> None:
    require_backend("cpu")
    x, (logits, basis) = make(FORMS["softmax"], (6, 7))
    for memory in (x, x.permute(0, 3, 1, 2).contiguous().permute(0, 2, 3, 1)):
        assert cpu._Arguments(FilterStep(memory, logits, basis, None, None)).x.data_ptr() == memory.data_ptr()


@pytest.mark.parametrize("memory", [torch.contiguous_format, torch.channels_last], ids=str)
def test_a_result_has_the_memory_format_of_x(memory: torch.memory_format) -> None:
    x, (logits, basis) = make(FORMS["softmax"], (6, 7))
    planes = x.permute(0, 3, 1, 2).contiguous(memory_format=memory)
    y = dynamic_filter(planes, logits, basis, data_format="channels_first")
    assert y.is_contiguous(memory_format=memory)


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_result_may_be_changed_in_place(backend: str) -> None:
    """Channels-first too, whose memory a backend may make as (B,C,H,W)."""
    require_backend(backend)
    x, (logits, basis) = make(FORMS["softmax"], (6, 7))
    x = x.permute(0, 3, 1, 2).contiguous().requires_grad_()
    for function, parameters in (
        (dynamic_filter, (logits, basis)),
        (global_filter, (basis[..., :1, :].expand(-1, -1, C, -1),)),
    ):
        y, changed = (function(x, *parameters, data_format="channels_first", backend=backend) for _ in range(2))
        ours, theirs = (torch.autograd.grad(t.sum(), x)[0] for t in (changed.relu_(), y.relu()))
        assert torch.equal(ours, theirs)


OPTIONS = {"dynamic_filter": ("softmax", [False]), "global_filter": ("weight_per_sample", [])}


@pytest.mark.parametrize("name", OPTIONS)
def test_registration_of_forms_passes_opcheck(name: str) -> None:
    form, options = OPTIONS[name]
    x, parameters = make(FORMS[form], (4, 6))
    tensors = [LAYOUTS["channels_first"](x).requires_grad_(), *(p.requires_grad_() for p in parameters), None, None]
    torch.library.opcheck(getattr(torch.ops.dfformer, name).default, (*tensors, None, *options))


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_channels_first_equals_eager() -> None:
    require_compiler()
    x, parameters = make(FORMS["weights"], (6, 7))
    inputs = [t.requires_grad_() for t in (x.permute(0, 3, 1, 2).contiguous(), *parameters)]

    def around(x: Tensor, weights: Tensor, basis: Tensor) -> Tensor:
        return 2 * dynamic_filter(-x, weights, basis, normalization=None, data_format="channels_first")

    def results(function: Callable[..., Tensor]) -> list[Tensor]:
        y = function(*inputs)
        return [y, *torch.autograd.grad(y, inputs, torch.ones_like(y))]

    compiled = torch.compile(around, fullgraph=True)
    for actual, wanted in zip(results(compiled), results(around), strict=True):
        assert torch.equal(actual, wanted)
        assert actual.stride() == wanted.stride()


def test_which_backend_takes_which_form() -> None:
    """On a GPU, what the fused kernel does not compute is cuFFT's."""
    base = Problem("dynamic_filter", "cuda", torch.float32, (2, 14, 14, 64), 4)
    step = layout.KernelSpec.of(base._replace(filters=64))
    assert layout.unsupported_reasons(step, layout.CHIPS["sm_90"]) == ["it mixes at most 16 filters, there are 64"]
    for backend, problem in (("cpu", base._replace(device="cpu", filters=64)), ("torch", base._replace(softmax=False))):
        require_backend(backend)
        assert not dispatch.by_name(backend).unsupported_reasons(problem)


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"normalization": "tanh"}, "normalization: expected 'softmax' or None, got 'tanh'"),
        (
            {"data_format": "NCHW"},
            "data_format: expected 'channels_last' or 'channels_first', got 'NCHW'",
        ),
        ({"data_format": "channels_first", "x": torch.ones(3, 4)}, r"x: expected shape \(B,C,H,W\) .*, got \(3, 4\)"),
        (
            {"basis": torch.ones(5, 6, 4, 5, 2)},
            r"logits: expected shape \(B,F,C\), F = 5, C a multiple of G = 5",
        ),
        ({"basis": torch.ones(0, 6, 4, 4, 2)}, r"basis: expected G >= 1 groups of channels, got shape \(0, 6"),
    ],
)
def test_bad_forms_raise(changed: dict[str, Any], message: str) -> None:
    x, (logits, basis) = make(FORMS["softmax"], (6, 7))
    with pytest.raises(ValueError, match=message):
        dynamic_filter(**({"x": x, "logits": logits, "basis": basis} | changed))
