"""A backend that tells what it runs."""

from collections.abc import Callable

from torch import Tensor

from dfformer_kernels.dispatch import TABLE, Backend


def counting(name: str, calls: list[str], device: str | None = None, reasons: tuple[str, ...] = ()) -> Backend:
    """The reference, telling ``calls`` when it runs."""

    def counted(op: str) -> Callable[..., Tensor | list[Tensor]]:
        def kernel(*args: object) -> Tensor | list[Tensor]:
            calls.append(f"{name} {op}")
            return TABLE[-1].kernels[op](*args)

        return kernel

    return Backend(name, device, {op: counted(op) for op in TABLE[-1].kernels}, lambda: list(reasons))
