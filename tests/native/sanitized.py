"""Runs a few small problems on a GPU's backends, for compute-sanitizer.sh: python sanitized.py [BACKEND...]

Results are compared in float64 on the CPU, so that little else runs on the device. Exit status 1 if one is wrong.
"""

import sys

import torch
from cases import OPS, Case, assert_all_within_bound, expected, gradients, make_grad, make_inputs

from dfformer_kernels import backends, dispatch

# A stage's plane, odd rows, columns kept in registers and not, one row, channels and filters that fill nothing.
CASES = [Case(3, 14, 14, 40), Case(2, 7, 7, 5, F=3), Case(1, 12, 10, 33), Case(2, 16, 15, 3, F=1), Case(2, 1, 6, 3)]
DTYPES = (torch.float32, torch.bfloat16)


def main(names: list[str]) -> None:
    for name in names:
        if reasons := backends()[name]:
            sys.exit(f"backend {name}: {'; '.join(reasons)}")
        count = sum(run(name, op, case, dtype) for op in OPS for case in CASES for dtype in DTYPES)
        print(f"{name}: {count} problems, forward and backward, are right", flush=True)


def run(backend: str, op_name: str, case: Case, dtype: torch.dtype) -> bool:
    """Whether the backend takes the problem; AssertionError if the result is wrong."""
    op = OPS[op_name]
    on_cpu = make_inputs(op, case, dtype)
    grad_y = make_grad(op, on_cpu)
    inputs = {key: t.detach().cuda().requires_grad_() for key, t in on_cpu.items()}
    problems = [dispatch.Problem.of(step, op.schema_order(inputs)) for step in (op.name, f"{op.name}_backward")]
    if any(dispatch.by_name(backend).unsupported_reasons(problem) for problem in problems):
        return False
    y = op.public(inputs, backend)
    assert_all_within_bound(y, gradients(y, inputs, grad_y.cuda()), expected(op, on_cpu, grad_y))
    return True


if __name__ == "__main__":
    main(sys.argv[1:] or ["cuda", "cufft"])
