"""The ``torch`` backend: the reference expression on torch.fft, on any device.

On a GPU, torch.fft plans the first transform of each kind, which a CUDA graph cannot capture.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

from torch import Tensor

from dfformer_kernels import reference
from dfformer_kernels.device import Prepared

_ran = Prepared()


def run(kernel: Callable[..., Any], name: str, *args: Any) -> Any:
    """``kernel(*args)``; raises RuntimeError if it would have to plan during capture."""
    if not any(isinstance(a, Tensor) and a.device.type == "cuda" for a in args):
        return kernel(*args)
    # A plan depends on strides, and each needed gradient may take another transform.
    layout = [(a.device, a.dtype, a.shape, a.stride()) if isinstance(a, Tensor) else str(a) for a in args]
    key = (name, *layout)
    new = _ran.is_new(key, f"{name} on torch.fft")
    result = kernel(*args)
    if new:
        _ran.add(key)
    return result


KERNELS: dict[str, Callable[..., Any]] = {
    name: partial(run, kernel, name) for name, kernel in reference.KERNELS.items()
}
