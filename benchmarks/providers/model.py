"""What bench_model measures: problems, providers in separate processes, and the rows of results."""

import itertools
import math
import multiprocessing
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, NamedTuple

import timm
import torch
from common import DTYPES, FAMILIES, TIMERS, allocated_peak, resident_peak
from torch import Tensor, nn
from torch.nn import functional as F

import dfformer
from dfformer.analysis.palette import BLUE, GREY
from dfformer.models.spectral import DynamicFilter, SpectralFilter
from dfformer.utils.eager_baseline import eager_baseline
from dfformer.utils.profile import saved_for_backward
from dfformer_kernels.tolerance import relative_error

INFERENCE, TRAINING = "inference", "training"
EAGER, COMPILED = "eager", "torch.compile"
SMALL_SIZES = ((64, 64), (128, 128))
SIZES = ((224, 224), (384, 384), (512, 512), (427, 640), (768, 768), (1024, 1024), (1536, 1536))
CLASSES = 1000


class ModelProblem(NamedTuple):
    """The problem that all providers are given: ``batch`` images of (H, W)."""

    task: str
    dtype: str
    mode: str
    batch: int
    size: tuple[int, int]

    @property
    def pixels(self) -> int:
        """The pixels of one image."""
        return math.prod(self.size)

    def __str__(self) -> str:
        return f"{self.task}, {self.dtype}, {self.mode}, {self.batch} x {size_name(self.size)}"


@dataclass(frozen=True)
class Provider:
    """A timm model, how it is modified, and how it is drawn."""

    architecture: str
    colour: str
    marker: str
    sized: bool = False  # it is built for an image size
    checked: bool = False  # it is compared with the authors' formulation with the same weights
    compiled: bool = False  # also run under torch.compile
    variant: Callable[[nn.Module], nn.Module] | None = None  # what is timed instead of the model
    prepare: Callable[[nn.Module, torch.dtype], nn.Module] | None = None  # for inference only, in place of autocast


def filters_replaced(model: nn.Module) -> nn.Module:
    """The authors' formulation after `dfformer.replace_dynamic_filters`: only its filter layers are this package's."""
    authors = eager_baseline(model)
    for name, module in model.named_modules():
        if isinstance(module, SpectralFilter):
            authors.set_submodule(name, module)
    return authors


def amplify_filters(model: nn.Module) -> None:
    """Gives the filters and their routing weights of usual size, in place.

    With those of a new model (0.02), the filters change the logits by less than bfloat16 rounds them, so that the check
    would not find a wrong filter.
    """
    for module in model.modules():
        if isinstance(module, SpectralFilter):
            nn.init.normal_(module.complex_weights)
        if isinstance(module, DynamicFilter):
            nn.init.kaiming_normal_(module.reweight.fc1.weight)
            nn.init.kaiming_normal_(module.reweight.fc2.weight)


AUTHORS, CONVFORMER = "authors", "convformer_s18"
PROVIDERS = {
    AUTHORS: Provider("dfformer_s18", GREY, "X", sized=True, compiled=True, variant=eager_baseline),
    "authors swapped": Provider("dfformer_s18", GREY, "P", sized=True, checked=True, variant=filters_replaced),
    "dfformer_s18": Provider("dfformer_s18", *FAMILIES["dfformer"], sized=True, checked=True, compiled=True),
    "cdfformer_s18": Provider("cdfformer_s18", *FAMILIES["cdfformer"], sized=True, checked=True),
    "gfformer_s18": Provider("gfformer_s18", *FAMILIES["gfformer"], sized=True, checked=True),
    CONVFORMER: Provider("convformer_s18", *FAMILIES["convformer"], compiled=True),
    "caformer_s18": Provider("caformer_s18", *FAMILIES["caformer"], compiled=True),
    "convnext_tiny": Provider("convnext_tiny", *FAMILIES["convnext"]),
    "swin_tiny": Provider("swin_tiny_patch4_window7_224", *FAMILIES["swin"], sized=True),
    "resnet50": Provider("resnet50", *FAMILIES["resnet"]),
}
if optimize := getattr(dfformer, "optimize_for_inference", None):
    PROVIDERS["dfformer_s18 optimized"] = Provider(
        "dfformer_s18", BLUE, "h", sized=True, checked=True, compiled=True, prepare=optimize
    )

# The values that a run can be restricted to, and those of full and quick runs.
AXES: dict[str, dict[str, Any]] = {
    "task": {name: name for name in (INFERENCE, TRAINING)},
    "dtype": {name: name for name in ("float32", "bfloat16")},
    "mode": {name: name for name in (EAGER, COMPILED)},
    "batch": {f"b{B}": B for B in (1, 8, 128)},
    "size": {f"{H}" if H == W else f"{H}x{W}": (H, W) for H, W in (*SMALL_SIZES, *SIZES)},
    "provider": {name: name for name in PROVIDERS},
}
FULL = {name: list(values.values()) for name, values in AXES.items()} | {"size": list(SIZES)}
QUICK = FULL | {
    "dtype": ["float32"],
    "mode": [EAGER],
    "batch": [1],
    "size": list(SMALL_SIZES),
    "provider": [AUTHORS, "dfformer_s18"],
}
ALL = {name: list(values.values()) for name, values in AXES.items()}


def _up_to(side: int) -> list[tuple[int, int]]:
    return [size for size in (*SMALL_SIZES, *SIZES) if math.prod(size) <= side**2]


# Image sizes for each batch, by device, task, dtype and mode. A CPU has fewer, to save time: compilation alone takes
# half a minute to a minute for each provider and problem.
COMPILED_SIZES = {8: [(224, 224)], 1: [*SMALL_SIZES, (1024, 1024)]}
PLANS: dict[str, dict[tuple[str, str, str], dict[int, list[tuple[int, int]]]]] = {
    "cpu": {
        (INFERENCE, "float32", EAGER): {1: _up_to(1536), 8: _up_to(512)},
        (INFERENCE, "float32", COMPILED): COMPILED_SIZES,
        (INFERENCE, "bfloat16", EAGER): {1: _up_to(1536), 8: _up_to(512)},
        (INFERENCE, "bfloat16", COMPILED): {8: COMPILED_SIZES[8]},
        (TRAINING, "float32", EAGER): {1: _up_to(1536), 8: _up_to(384)},
        (TRAINING, "float32", COMPILED): COMPILED_SIZES,
        (TRAINING, "bfloat16", EAGER): {1: _up_to(1024), 8: _up_to(224)},
    },
    "cuda": {  # published figures of such models are of 128 images of 224x224
        (task, dtype, mode): {B: _up_to(1536) if mode == EAGER else [(224, 224), (1024, 1024)] for B in (1, 8)}
        | {128: [(224, 224)]}
        for task, dtype, mode in itertools.product((INFERENCE, TRAINING), ("float32", "bfloat16"), (EAGER, COMPILED))
    },
}
# From this many pixels on, a training problem's outputs are checked, but not its gradients.
GRADIENT_PIXELS = 2**19


@dataclass(frozen=True)
class Row:
    """One provider on one problem, as in model.csv."""

    task: str
    dtype: str
    mode: str
    batch: int
    H: int
    W: int
    provider: str
    calls: int
    ms: float  # median time of a call
    images_per_second: float
    peak_bytes: int | None  # without model and optimizer; None if the system does not report it
    saved_bytes: int | None  # for backward; None if it is not measured
    error: float | None  # largest relative error; None if it is not checked

    @property
    def problem(self) -> ModelProblem:
        return ModelProblem(self.task, self.dtype, self.mode, self.batch, (self.H, self.W))


class LeftOut(NamedTuple):
    """A provider that was not measured on a problem."""

    problem: ModelProblem
    provider: str
    reason: str


class Setting(NamedTuple):
    """How to measure: ``budget`` is seconds a provider and problem."""

    device: str
    threads: int
    budget: float


def mib_per_image(r: Row, nbytes: int | None) -> float | None:
    return None if nbytes is None else nbytes / 2**20 / r.batch


def size_name(size: tuple[int, int]) -> str:
    return f"{size[0]}x{size[1]}"


def selection(only: Sequence[str], quick: bool = False) -> dict[str, list[Any]]:
    """The values of each axis that a run covers."""
    defaults = QUICK if quick else FULL
    return {
        axis: [value for word, value in values.items() if word in only] or defaults[axis]
        for axis, values in AXES.items()
    }


def problems(selected: dict[str, list[Any]], device: str) -> Iterator[tuple[ModelProblem, list[str]]]:
    """Each problem of a run with the names of its providers."""
    axes = [selected[name] for name in ("task", "dtype", "mode", "batch", "size")]
    for problem in itertools.starmap(ModelProblem, itertools.product(*axes)):
        providers = [name for name in selected["provider"] if _takes_part(PROVIDERS[name], problem)]
        planned = PLANS[device].get(problem[:3], {}).get(problem.batch, [])
        if providers and problem.size in planned:
            yield problem, providers


def _takes_part(provider: Provider, problem: ModelProblem) -> bool:
    for_task = problem.task == INFERENCE or provider.prepare is None
    return for_task and (problem.mode == EAGER or provider.compiled)


# --- processes


@contextmanager
def provider_process(name: str, problem: ModelProblem, setting: Setting) -> Iterator[Connection]:
    """A new process with a provider that is prepared for a problem; `ask` calls its methods."""
    # Forked from a process that has only imported torch and timm, because these imports take seconds.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["torch", "timm", "matplotlib.figure"])
    ours, theirs = context.Pipe()
    process = context.Process(target=_serve, args=(theirs, name, problem, setting), daemon=True)
    process.start()
    theirs.close()
    try:
        yield ours
    finally:
        ours.close()  # ends the process
        process.join()


def ask(connection: Connection, method: str, *arguments: object) -> Any:
    """Returns the result of a method of the process's `Entry`; raises ChildProcessError with the reason if it fails."""
    with suppress(OSError):  # it may have ended and sent the reason
        connection.send((method, arguments))
    try:
        answer = connection.recv()
    except (EOFError, OSError):
        raise ChildProcessError("its process was killed") from None
    if isinstance(answer, Exception):
        raise ChildProcessError(str(answer))
    return answer


def _serve(connection: Connection, name: str, problem: ModelProblem, setting: Setting) -> None:
    torch.set_num_threads(setting.threads)
    try:
        entry = Entry(PROVIDERS[name], problem, setting.device)
        while True:
            method, arguments = connection.recv()
            connection.send(getattr(entry, method)(*arguments))
    except EOFError:  # the parent process has closed its end
        pass
    except Exception as error:
        connection.send(RuntimeError(f"{type(error).__name__}: {error}".splitlines()[0]))


class Costs(NamedTuple):
    """The cost of a call; see `Row`."""

    seconds: float
    peak_bytes: int | None
    saved_bytes: int | None


class Entry:
    """A provider with everything that a call on a problem needs.

    ``model`` has the parameters. ``timed`` is called: the same model, prepared or compiled if the problem says so.
    """

    def __init__(self, provider: Provider, problem: ModelProblem, device: str) -> None:
        self.provider, self.problem, self.device = provider, problem, device
        torch.manual_seed(0)
        options = {"img_size": problem.size} if provider.sized else {}
        model = timm.create_model(provider.architecture, num_classes=CLASSES, drop_path_rate=0.0, **options)
        amplify_filters(model)
        model = provider.variant(model) if provider.variant else model
        # In the memory format that convolutions do not have to reorder.
        self.model = model.to(device).to(memory_format=torch.channels_last).train(problem.task == TRAINING)
        self.dtype = DTYPES[problem.dtype]
        self.timed = provider.prepare(self.model, self.dtype) if provider.prepare else self.model
        if problem.mode == COMPILED:
            self.timed = torch.compile(self.timed, dynamic=False)
        self.x = torch.randn(problem.batch, 3, *problem.size).to(device, memory_format=torch.channels_last)
        self.target = torch.randint(CLASSES, (problem.batch,)).to(device)
        if problem.task == TRAINING:
            self.optimizer = torch.optim.AdamW(self.model.parameters(), lr=1e-4, fused=True)
            self._allocate_moments()
        self.run = self.infer if problem.task == INFERENCE else self.train

    def _allocate_moments(self) -> None:
        for p in self.model.parameters():
            p.grad = torch.zeros_like(p)
        self.optimizer.step()
        self.optimizer.zero_grad()

    def infer(self) -> Tensor:
        with torch.inference_mode():
            return self.forward(self.x)

    def train(self) -> None:
        F.cross_entropy(self.forward(self.x).float(), self.target).backward()
        self.optimizer.step()
        self.optimizer.zero_grad()

    def forward(self, x: Tensor) -> Tensor:
        if self.provider.prepare:  # the model casts its inputs itself
            return self.timed(x)
        with self.autocast():
            return self.timed(x)

    def autocast(self) -> AbstractContextManager[None]:
        return torch.autocast(self.device, torch.bfloat16, enabled=self.dtype == torch.bfloat16)

    def costs(self) -> Costs:
        if self.problem.mode == COMPILED or self.provider.prepare:
            self.run()  # compiling and packing weights are not part of a call
        seconds: list[float] = []

        def timed_once() -> None:
            seconds.extend(self.times(0))

        peak = resident_peak(timed_once) if self.device == "cpu" else allocated_peak(timed_once, self.device)
        saved = None
        if (self.problem.task, self.problem.mode) == (TRAINING, EAGER):
            with self.autocast():
                saved = saved_for_backward(self.model, self.x)
        self._logits()
        return Costs(min(seconds), peak, saved)

    def times(self, sample: float) -> list[float]:
        """The times of calls that together take ``sample`` seconds; at least one call."""
        return TIMERS[self.device](self.run, sample)

    def error(self) -> float:
        """The largest relative error of each image's logits and of the gradients.

        They are compared with the authors' formulation in float32, which gets one image at a time to save memory.
        """
        logits = self._logits()
        baseline = eager_baseline(self.model)
        with torch.no_grad():
            errors = [relative_error(y, baseline(x[None])[0]) for x, y in zip(self.x, logits, strict=True)]
        if self.problem.task == TRAINING and self.problem.batch * self.problem.pixels < GRADIENT_PIXELS:
            gradients = self._gradients(self.forward, self.model)
            errors.append(relative_error(gradients, self._gradients(baseline, baseline)))
        return max(errors)

    def _logits(self) -> Tensor:
        """Raises ValueError if the logits have a wrong shape or are not finite."""
        with torch.inference_mode(self.problem.task == INFERENCE):
            y = self.forward(self.x).detach()
        if y.shape != (self.problem.batch, CLASSES) or not y.isfinite().all():
            raise ValueError(
                f"logits: got {tuple(y.shape)}, {y.isfinite().sum()} of them finite, expected "
                f"{(self.problem.batch, CLASSES)}, all finite"
            )
        return y

    def _gradients(self, forward: Callable[[Tensor], Tensor], model: nn.Module) -> Tensor:
        """The gradients of all parameters as one vector."""
        loss = F.cross_entropy(forward(self.x).float(), self.target)
        return torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
