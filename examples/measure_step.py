"""The filter step by itself: checked against torch.fft in float64, then timed against it, forward and backward.

    python examples/measure_step.py

``benchmarks/bench_op.py`` does this for all shapes, and carefully enough for published numbers.
"""

import torch
from torch import Tensor
from torch.utils.benchmark import Timer

from dfformer_kernels import dynamic_filter

B, H, W, C, F = 4, 28, 28, 256, 4


def with_torch_fft(x: Tensor, logits: Tensor, basis: Tensor) -> Tensor:
    filters = torch.einsum("bfc,hkf->bhkc", logits.softmax(1).to(basis.dtype), basis)
    spectrum = torch.fft.rfft2(x, dim=(1, 2), norm="ortho") * filters
    return torch.fft.irfft2(spectrum, s=x.shape[1:3], dim=(1, 2), norm="ortho")


def main() -> None:
    torch.manual_seed(0)
    x = torch.randn(B, H, W, C, requires_grad=True)
    logits = torch.randn(B, F, C, requires_grad=True)
    basis = torch.randn(H, W // 2 + 1, F, 2, requires_grad=True)
    exact = with_torch_fft(x.double(), logits.double(), torch.view_as_complex(basis.double()))
    error = (dynamic_filter(x, logits, basis) - exact).norm() / exact.norm()
    print(f"relative error {error:.1e}")
    assert error < 1e-6
    steps = {
        "torch.fft": lambda: with_torch_fft(x, logits, torch.view_as_complex(basis)),
        "dynamic_filter": lambda: dynamic_filter(x, logits, basis),
    }
    for name, step in steps.items():
        forward = Timer("step()", globals={"step": step}, num_threads=torch.get_num_threads())
        both = Timer("step().sum().backward()", globals={"step": step}, num_threads=torch.get_num_threads())
        times = [1e3 * timer.blocked_autorange(min_run_time=0.2).median for timer in (forward, both)]
        print(f"{name}: forward {times[0]:.2f} ms, with backward {times[1]:.2f} ms")


if __name__ == "__main__":
    main()
