"""How close to the float64 reference a result must be: the one policy that tests, `dfformer doctor` and benchmarks share."""

import torch
from torch import Tensor

# Largest allowed ||actual - expected|| / ||expected|| by storage dtype, for the same inputs in float64. float32 allows
# the rounding of two transforms; the 16-bit types one rounding of the result (their unit roundoff).
BOUND = {torch.float64: 1e-13, torch.float32: 1e-6, torch.bfloat16: 2.0**-8, torch.float16: 2.0**-11}


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """``||actual - expected|| / ||expected||`` in float64; NaN if either has one, infinite on a shape mismatch."""
    if actual.shape != expected.shape:
        return float("inf")
    actual, expected = actual.detach().double().cpu(), expected.detach().double().cpu()
    difference, scale = torch.linalg.vector_norm(actual - expected).item(), torch.linalg.vector_norm(expected).item()
    if difference == 0:
        return 0.0
    return difference / scale if scale else float("inf")
