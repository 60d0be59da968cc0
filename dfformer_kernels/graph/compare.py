"""Compares two modules: their outputs, gradients, buffers and use of random numbers."""

import random
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

from dfformer_kernels.tolerance import relative_error

# Two ways to compute the same formula in float32 differ by about 1e-6; different formulas differ by far more.
AGREEMENT = 1e-4
# Wider, because gradients are sums whose terms partly cancel.
_GRADIENT_AGREEMENT = 1e-3
_RANDOM = "use of random numbers"
_INVERSE_TRANSFORMS = (torch.fft.irfft2, torch.fft.irfftn)


@contextmanager
def isolated(device: torch.device) -> Iterator[None]:
    """Isolates random numbers, Python's and NumPy's too, autocast and the gradient mode inside from those outside."""
    devices = range(torch.cuda.device_count() if torch.cuda.is_initialized() else 0)
    modes = torch.autocast(device.type, enabled=False), torch.inference_mode(False), torch.enable_grad()
    of_python, of_numpy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices), modes[0], modes[1], modes[2]:
        _seed(0)
        try:
            yield
        finally:
            random.setstate(of_python)
            np.random.set_state(of_numpy)


def _seed(seed: int) -> None:
    random.seed(seed)
    np.random.seed(seed)
    # For GPUs that are not in use yet, torch.manual_seed would replace the seed that they start with.
    unused = torch.backends.cuda.is_built() and not torch.cuda.is_initialized()
    (torch.default_generator.manual_seed if unused else torch.manual_seed)(seed)


def tensors(result: Any) -> list[Tensor]:
    """The tensors of a result, which may be a tensor or tuples, lists and dicts of them.

    Raises TypeError if there are none, or something else.
    """
    found: list[Any] = []
    fx.node.map_aggregate(result, found.append)
    other = {type(t).__name__ for t in found if not isinstance(t, Tensor | None)}
    if other or all(t is None for t in found):
        raise TypeError(f"its result has {', '.join(sorted(other)) or 'no tensors'}; expected tensors")
    return [t for t in found if t is not None]


def results(module: nn.Module, inputs: Sequence[Any]) -> dict[str, Tensor]:
    """The outputs, the gradients of a fixed random function of them, and the buffers after the call, by name."""
    inputs = [x.clone().requires_grad_(x.is_floating_point()) if isinstance(x, Tensor) else x for x in inputs]
    _seed(1)
    with _ContiguousInverse():
        outputs = tensors(module.forward(*inputs))  # without hooks, which are not ours to call
    after = _drawn()
    _seed(2)
    scalar = sum((y * torch.randn(y.shape, device=y.device)).sum() for y in outputs if y.requires_grad)
    leaves = {f"input {i}": x for i, x in enumerate(inputs) if isinstance(x, Tensor) and x.requires_grad}
    leaves |= {name: p for name, p in module.named_parameters() if p.requires_grad}
    gradients: Sequence[Tensor | None] = [None] * len(leaves)
    if isinstance(scalar, Tensor):
        gradients = torch.autograd.grad(scalar, list(leaves.values()), allow_unused=True)
    found = {f"output {i}": y.detach() for i, y in enumerate(outputs)}
    found |= {f"gradient of {n}": g for n, g in zip(leaves, gradients, strict=True) if g is not None}
    found |= {f"buffer {n}": b.detach().clone() for n, b in module.named_buffers()}
    found[_RANDOM] = after
    return {name: torch.view_as_real(t) if t.is_complex() else t for name, t in found.items()}


def _drawn() -> Tensor:
    """The states of the generators of torch, Python and NumPy, as numbers."""
    of_numpy = np.random.get_state(legacy=False)["state"]
    numbers = *torch.get_rng_state().tolist(), *random.getstate()[1], *of_numpy["key"].tolist(), of_numpy["pos"]
    return torch.tensor(numbers)


def difference(theirs: dict[str, Tensor], ours: dict[str, Tensor]) -> str:
    """How two `results` differ; "" if they agree."""
    if alone := theirs.keys() ^ ours.keys():
        has = "exists, ours does not" if min(alone) in theirs else "does not exist, ours does"
        return f"its {min(alone)} {has}"
    scale = max((_rms(t) for name, t in theirs.items() if name.startswith("gradient")), default=0.0)
    for name, expected in theirs.items():
        if ours[name].dtype != expected.dtype:
            return f"its {name} is {expected.dtype} where ours is {ours[name].dtype}"
        is_gradient = name.startswith("gradient")
        relative = _error(ours[name], expected, scale if is_gradient else 0.0)
        bound = _GRADIENT_AGREEMENT if is_gradient else 0.0 if name == _RANDOM else AGREEMENT
        if not relative <= bound:
            return f"its {name} differs from ours by {relative:.1e} relative"
    return ""


def _error(actual: Tensor, expected: Tensor, scale: float) -> float:
    """The relative error; if ``expected`` is mere rounding error beside ``scale``, the error relative to ``scale``."""
    if actual.shape != expected.shape or not scale:
        return relative_error(actual, expected)
    return _rms(actual.double() - expected) / max(_rms(expected), 1e-3 * scale)


def _rms(t: Tensor) -> float:
    return t.double().square().mean().sqrt().item()


class _ContiguousInverse(TorchFunctionMode):
    """Makes the result of irfft2 contiguous like our step's, because dropout draws in the order of memory."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        return result.contiguous() if func in _INVERSE_TRANSFORMS else result
