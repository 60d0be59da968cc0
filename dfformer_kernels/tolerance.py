"""How close a result must be to the float64 reference: one policy for tests, ``dfformer doctor`` and benchmarks."""

from collections.abc import Sequence

import torch
from torch import Tensor

# The largest allowed ||actual - expected|| / ||expected|| by storage dtype, where expected is computed in float64 from
# the same inputs. float32 allows for the rounding of two transforms; the 16-bit types for one rounding of the result.
BOUND = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; NaN if either contains NaN, infinite if shapes differ."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference, scale = torch.linalg.vector_norm(actual - expected).item(), torch.linalg.vector_norm(expected).item()
    if difference == 0:
        return 0.0
    return difference / scale if scale else float("inf")


def gradient_errors(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> list[float]:
    """The relative errors of gradients, where all one-element gradients together count as one vector.

    A scalar's gradient is a sum over a whole tensor. If the sum happens to cancel, no float32 computation of it has any
    relative accuracy, not even the reference's. Beside the other scalars' gradients, it has a fair scale.
    """
    pairs = list(zip(actual, expected, strict=True))
    errors = [relative_error(a, e) for a, e in pairs if e.numel() != 1]
    scalars = [(a.reshape(1), e.reshape(1)) for a, e in pairs if e.numel() == 1]
    if scalars:
        errors.append(relative_error(torch.cat([a for a, _ in scalars]), torch.cat([e for _, e in scalars])))
    return errors
