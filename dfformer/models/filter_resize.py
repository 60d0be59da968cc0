"""Resizing spectral filters to another plane: two rules, each two small matrix products along H and K.

A stored filter is (H, K, ...), ``K = W//2 + 1``: rows in FFT order (frequencies 0, 1, .., then the negative ones), and
the non-negative half of the columns.
"""

import torch
from torch import Tensor
from torch.nn import Parameter

from dfformer.utils.accepted import check_arguments, choice
from dfformer_kernels.kept import kept
from dfformer_kernels.reference import compute_dtype

RULES = ("bicubic", "fourier")
RULE = choice(*RULES)


def resize_filter(weight: Tensor, size: tuple[int, int], new_size: tuple[int, int], rule: str = "bicubic") -> Tensor:
    """Resizes filters stored for planes of ``size`` (H, W) to ``new_size``. Differentiable and deterministic.

    Args:
        weight: (H, W//2 + 1, ...), any trailing dimensions.
        size, new_size: the planes, in pixels.
        rule: one of

            ``"bicubic"``: the authors' rule (``resize_complex_weight``). The array is treated as an image and resized
            with ``align_corners=True``. The filter keeps its shape over the range of frequencies in *cycles per pixel*.
            Official checkpoints are adapted by this rule. It is right if objects keep their size in pixels, e.g. when
            training on crops and testing on larger or wider images. It ignores that rows wrap around, so the two sides
            of the highest frequency along H are blended.

            ``"fourier"``: the array is treated as a spectrum. Frequencies in *cycles per image* keep their gain, rows
            wrap around, new frequencies get gain 0 and lost ones are dropped. It is right if the same scene is sampled
            more finely or coarsely: it filters a band-limited image exactly as before. Enlarging removes all detail
            above the stored band, so fine-tune after a large step.

    Returns:
        (new_H, new_W//2 + 1, ...), in weight's dtype.

    Raises:
        ValueError: the rule is unknown, or ``size`` is not the weight's.
    """
    check_arguments(RULE, resize=rule)
    (H, W), (new_H, new_W) = size, new_size
    if tuple(weight.shape[:2]) != (H, W // 2 + 1):
        raise ValueError(
            f"size: expected that of weight {tuple(weight.shape)}, which is (H, W//2 + 1, ...), got {(H, W)}"
        )
    if torch.compiler.is_compiling() or type(weight) not in (Tensor, Parameter):  # traced, or a fake tensor
        return scriptable_resize(weight, (H, W), (new_H, new_W), rule)
    dtype = compute_dtype(weight.dtype)
    return _along_H_and_K(weight, *_kept_matrices((H, W), (new_H, new_W), rule, weight.device, dtype))


def scriptable_resize(weight: Tensor, size: tuple[int, int], new_size: tuple[int, int], rule: str) -> Tensor:
    """`resize_filter` for torch.jit.script: checks nothing, and computes its matrices at every call."""
    rows, columns = _matrices(size, new_size, rule)
    return _along_H_and_K(weight, rows, columns)


def _along_H_and_K(weight: Tensor, rows: Tensor, columns: Tensor) -> Tensor:  # noqa: N802 (the dimensions' names)
    values = weight if weight.dtype == torch.float64 else weight.float()
    resized = (rows.to(values) @ values.flatten(1)).unflatten(1, (values.shape[1], -1))
    return (columns.to(values) @ resized).unflatten(2, values.shape[2:]).to(weight.dtype)


def _matrices(size: tuple[int, int], new_size: tuple[int, int], rule: str) -> tuple[Tensor, Tensor]:
    """The products' matrices (new_H, H) and (new_K, K), float64."""
    H, K, new_H, new_K = size[0], size[1] // 2 + 1, new_size[0], new_size[1] // 2 + 1
    if rule == "bicubic":
        return _bicubic(H, new_H), _bicubic(K, new_K)
    # Frequencies keep their gain, and those that are new get gain 0.
    rows = _folded_frequencies(new_H, H) if new_H < H else _folded_frequencies(H, new_H).sign().T
    return rows, torch.eye(new_K, K, dtype=torch.float64, device="cpu")


# The matrices are the same for all layers of a stage and from step to step. A training run with random crops sees a few
# hundred sizes.
@kept(256)
def _kept_matrices(
    size: tuple[int, int], new_size: tuple[int, int], rule: str, device: torch.device, dtype: torch.dtype
) -> tuple[Tensor, ...]:
    return tuple(matrix.to(device, dtype) for matrix in _matrices(size, new_size, rule))


def _bicubic(old: int, new: int) -> Tensor:
    """(new, old) float64: cubic convolution (a = -0.75, borders repeated) at ``i * (old - 1) / (new - 1)``."""
    # Every constant is exact in float32, to which torch.onnx.export rounds it.
    position = torch.arange(new, dtype=torch.float64, device="cpu") * (old - 1) / max(new - 1, 1)
    first = position.floor()
    matrix = torch.zeros(new, old, dtype=torch.float64, device="cpu")
    for tap in range(-1, 3):
        distance = (position - (first + tap)).abs()
        near = (1.25 * distance - 2.25) * distance * distance + 1
        far = ((-0.75 * distance + 3.75) * distance - 6) * distance + 3
        column = (first + tap).clamp(0, old - 1)[:, None] == torch.arange(old, device="cpu")
        matrix = matrix + column.to(torch.float64) * torch.where(distance <= 1, near, far)[:, None]
    return matrix


def _folded_frequencies(small: int, large: int) -> Tensor:
    """(small, large): frequencies of the small plane; its highest, if shared by both signs, is their average."""
    signed = torch.arange(large, device="cpu")
    signed = torch.where(signed > large // 2, signed - large, signed)  # an even large's highest counts as positive
    index = torch.arange(small, device="cpu")[:, None]
    taken = ((signed % small) == index) & (2 * signed.abs() <= small)
    weight = taken.to(torch.float64)
    return weight / weight.sum(1, keepdim=True)
