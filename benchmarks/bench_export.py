"""Times the files that `dfformer export` writes, and two kinds of transforms in ONNX, alone and in a detector.

    python benchmarks/bench_export.py [--only onnx,pt2] [--threads N] [--output FOLDER]

DFFormer-S18 is exported to each format, and its files and the model are timed in turns in one process. Files in the
folder of the same commit, machine and threads are timed too, so a run can be split with ``--only``. Everything is
checked before it is timed.

Writes export.csv, export_transforms.csv, export_detector.csv and export.json.
"""

import argparse
import shlex
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import onnx
import onnxruntime
import timm
import torch
from common import earlier_run, in_turns, names, provenance, write_csv, write_json
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from dfformer import replace_dynamic_filters, with_dft_matmul
from dfformer.export.export import BOUND, export
from dfformer.export.formats import FORMATS
from dfformer_kernels.dft_matmul import matrices as dft_matrices
from dfformer_kernels.tolerance import relative_error

IMG_SIZE, BATCHES = 224, (1, 8)
ROUNDS, SECONDS = 5, 0.5  # rounds of calls in turns; seconds for each in a round
# format and fused, by name in the table
WAYS = {"onnx": ("onnx", False), "pt2": ("pt2", False), "aoti": ("aoti", False)}
WAYS |= {f"{name} --fused": (name, True) for name in ("pt2", "aoti")}
MODEL, TRANSFORMS, DETECTOR = "model", "transforms", "detector"
# Planes and channels of the model at 224, of its first stage at 512 and 1024, and one with a large prime side.
PLANES = [(14, 14, 640), (28, 28, 256), (56, 56, 128), (128, 128, 128), (256, 256, 128), (251, 251, 32)]

DETECTOR_PLANES = [(20, 20, 256), (40, 40, 128), (80, 80, 64)]  # the three levels of a detector at 640x640

Run = Callable[[Tensor], Any]


class Row(NamedTuple):
    """The model in Python, or one of its files."""

    run_as: str
    mib: float  # size of the file, or of the model's weights
    export_seconds: float | None
    error: float | None  # largest relative error of a file's logits
    ms: dict[int, float]  # median time of a call, by batch


def main(argv: Sequence[str] | None = None) -> None:
    words = [*WAYS, TRANSFORMS, DETECTOR]
    parser = argparse.ArgumentParser(description="Times exported models.")
    parser.add_argument("--only", type=names(words), default=words, help=f"of {', '.join(words)}")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--output", type=Path, default=Path("build/bench_export"), help="folder for what is written")
    args = parser.parse_args(argv)
    torch.set_num_threads(args.threads)
    args.output.mkdir(parents=True, exist_ok=True)
    machine = provenance(args.threads, "cpu", ["onnx", "onnxscript", "onnxruntime"])
    commands, seconds = _continued(args.output, machine)
    commands.append(shlex.join(["python", "benchmarks/bench_export.py", *(sys.argv[1:] if argv is None else argv)]))

    def keep() -> None:
        content = {"machine": machine, "commands": commands, "export_seconds": seconds}
        write_json(args.output / "export.json", content)

    torch.manual_seed(0)
    model = timm.create_model("dfformer_s18", img_size=IMG_SIZE).eval()
    for name in (name for name in WAYS if name in args.only):
        chosen, fused = WAYS[name]
        start = time.perf_counter()
        export(model, _file(args.output, name), IMG_SIZE, chosen, fused=fused)
        seconds[name] = time.perf_counter() - start
        keep()
    if seconds:
        rows = [row._asdict() for row in timed(model, args.output, seconds)]
        rows = [row | {f"ms_{B}": ms for B, ms in row.pop("ms").items()} for row in rows]
        _report(args.output / "export.csv", rows)
    if TRANSFORMS in args.only:
        _report(args.output / "export_transforms.csv", [transforms(*plane) for plane in PLANES])
    if DETECTOR in args.only:
        _report(args.output / "export_detector.csv", [detector(*plane) for plane in DETECTOR_PLANES])
    keep()


def _continued(folder: Path, machine: dict[str, Any]) -> tuple[list[str], dict[str, float]]:
    """The commands so far, and the export time of each file in the folder; SystemExit if other code made them."""
    content = earlier_run(folder / "export.json", machine, ("machine", "commit", "torch", "threads"))
    if content is None:
        return [], {}
    return content["commands"], {k: v for k, v in content["export_seconds"].items() if _file(folder, k).exists()}


def _file(folder: Path, name: str) -> Path:
    return folder / f"{name.replace(' --', '_')}{FORMATS[WAYS[name][0]].suffix}"


def _report(path: Path, rows: list[dict[str, Any]]) -> None:
    for row in rows:
        print("  ".join(f"{k} {v:.3g}" if isinstance(v, float) else f"{k} {v}" for k, v in row.items()))
    write_csv(path, list(rows[0]), rows)


@torch.inference_mode()
def timed(model: torch.nn.Module, folder: Path, seconds: dict[str, float]) -> list[Row]:
    """The model, and each file it was exported to."""
    loaded: dict[str, Run] = {MODEL: model}
    loaded |= {name: FORMATS[WAYS[name][0]].load(_file(folder, name)) for name in WAYS if name in seconds}
    images = {B: torch.randn(B, 3, IMG_SIZE, IMG_SIZE) for B in BATCHES}
    errors = {name: max(_error(run, model, x) for x in images.values()) for name, run in loaded.items()}
    ms = in_turns(
        {(name, B): partial(run, x) for name, run in loaded.items() for B, x in images.items()}, ROUNDS, SECONDS
    )
    weights = sum(p.nbytes for p in model.parameters())
    return [
        Row(
            name,
            (weights if name == MODEL else _file(folder, name).stat().st_size) / 2**20,
            seconds.get(name),
            None if name == MODEL else errors[name],
            {B: ms[name, B] for B in BATCHES},
        )
        for name in loaded
    ]


def _error(run: Run, model: Run, x: Tensor) -> float:
    (logits,) = pytree.tree_leaves(run(x))
    error = relative_error(logits, model(x))
    if not error <= BOUND:  # also fails for NaN
        raise ValueError(f"a file is wrong for {len(x)} images: error {error:.1e}, bound {BOUND}")
    return error


class Copy(nn.Module):
    """The dynamic filter as in detectors: channels-first, for one square size."""

    def __init__(self, size: tuple[int, int], C: int) -> None:
        super().__init__()
        self.route = nn.Linear(C, 4 * C)
        self.complex_weight = nn.Parameter(torch.randn(size[0], size[1] // 2 + 1, 4, 2) * 0.1)

    def forward(self, x: Tensor) -> Tensor:
        B, C, H, W = x.shape
        routing = self.route(x.mean((2, 3))).view(B, 4, C).softmax(1)
        X = torch.fft.rfft2(x, dim=(2, 3), norm="ortho")
        weight = torch.view_as_complex(self.complex_weight)
        return torch.fft.irfft2(
            X * torch.einsum("bfc,hkf->bchk", routing.to(weight.dtype), weight), s=(H, W), dim=(2, 3), norm="ortho"
        )


@torch.no_grad()
def detector(H: int, W: int, C: int) -> dict[str, Any]:
    """One level of a detector with replaced filters in onnxruntime, one image: DFT operators or matrix products."""
    model = nn.Sequential(
        nn.Conv2d(3, C, 8, stride=8), Copy((H, W), C), nn.BatchNorm2d(C), nn.SiLU(), nn.Conv2d(C, 6, 1)
    )
    report = replace_dynamic_filters(model.eval())
    if not report.originals:
        raise ValueError(f"the copy was not swapped:\n{report}")
    x = torch.randn(1, 3, 8 * H, 8 * W)
    program = torch.export.export(model, (x,))
    with_dft = program.run_decompositions({torch.ops.dfformer.dynamic_filter.default: _dft_filter})
    runs = {name: _exported(each) for name, each in (("dft", with_dft), ("products", with_dft_matmul(program)))}
    row: dict[str, Any] = {"H": H, "W": W, "C": C}
    row |= {f"{name}_error": _error(run, model, x) for name, run in runs.items()}
    return row | {
        f"{name}_ms": ms
        for name, ms in in_turns({name: partial(run, x) for name, run in runs.items()}, ROUNDS, SECONDS).items()
    }


def _dft_filter(x: Tensor, logits: Tensor, basis: Tensor, *_: Any) -> Tensor:
    """The dynamic filter without StarReLU on real and imaginary parts, which torch.onnx.export can convert."""
    X = torch.view_as_real(torch.fft.fft(torch.fft.rfft(x, dim=2, norm="ortho"), dim=1, norm="ortho"))
    (a, b), (c, d) = X.unbind(-1), torch.einsum("bfc,hkft->bhkct", logits.softmax(1), basis).unbind(-1)
    Z = torch.view_as_complex(torch.stack([a * c - b * d, a * d + b * c], -1))
    return torch.fft.irfft(torch.fft.ifft(Z, dim=1, norm="ortho"), n=x.shape[2], dim=2, norm="ortho")


def _exported(program: torch.export.ExportedProgram) -> Run:
    exported = torch.onnx.export(program, dynamo=True, verbose=False)
    assert exported is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    content = exported.model_proto.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {session.get_inputs()[0].name: x.numpy()})[0])


def transforms(H: int, W: int, C: int) -> dict[str, Any]:
    """rfft2 of one sample in onnxruntime: two DFT operators, or two matrix products with constants."""
    x, K = torch.randn(1, H, W, C), W // 2 + 1
    matrices = dft_matrices(H, W, torch.float32)
    X = torch.fft.rfft2(x.double(), dim=(1, 2), norm="ortho")
    dft = _session(
        [("DFT", ["x", "", "axis_W"], {"onesided": 1}), ("DFT", ["0", "", "axis_H"], {})],
        {"axis_W": torch.tensor(2), "axis_H": torch.tensor(1)},
        rank=5,
    )
    products = _session(
        [("MatMul", ["columns", "x"], {}), ("Reshape", ["0", "shape"], {}), ("MatMul", ["rows", "1"], {})],
        {"columns": matrices[0], "rows": matrices[1], "shape": torch.tensor([1, 2 * H, K * C])},
        rank=4,
    )
    runs = {"dft": lambda: dft(x[..., None]), "products": lambda: products(x)}
    # orthonormal; from (part, row) of one sample to real and imaginary parts last
    spectra = {
        "dft": runs["dft"]() / (H * W) ** 0.5,
        "products": runs["products"]().view(1, 2, H, K, C).permute(0, 2, 3, 4, 1),
    }
    row: dict[str, Any] = {"H": H, "W": W, "C": C}
    row |= {f"{name}_ms": ms for name, ms in in_turns(runs, ROUNDS, SECONDS).items()}
    row |= {f"{name}_error": relative_error(y, torch.view_as_real(X)) for name, y in spectra.items()}
    return row | {"matrices_kib": sum(m.nbytes for m in matrices) / 2**10}


def _session(steps: Sequence[tuple[str, list[str], dict[str, Any]]], constants: dict[str, Tensor], rank: int) -> Run:
    """A program of operators, each with its inputs and attributes; the result of the i-th is named i."""
    nodes = [
        onnx.helper.make_node(kind, inputs, [str(i)], **attributes)
        for i, (kind, inputs, attributes) in enumerate(steps)
    ]
    kind = onnx.TensorProto.FLOAT
    graph = onnx.helper.make_graph(
        nodes,
        "transform",
        [onnx.helper.make_tensor_value_info("x", kind, [None] * rank)],
        [onnx.helper.make_tensor_value_info(nodes[-1].output[0], kind, None)],
        [onnx.numpy_helper.from_array(t.numpy(), name) for name, t in constants.items()],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 20)], ir_version=10)
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(None, {"x": x.numpy()})[0])


if __name__ == "__main__":
    main()
