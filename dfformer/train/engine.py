"""``dfformer train``: the engine. It owns the loop, processes, precision, checkpoints and logs; a task owns the rest.

No random state carries over from one step to the next: the draws of a step follow from (seed, step, rank), and its
images from `dfformer.data.images`. So a run resumed within an epoch repeats the uninterrupted one.
"""

import json
import math
import os
import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack, closing, contextmanager, nullcontext
from dataclasses import asdict
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import Tensor, distributed, nn
from torch.distributed.checkpoint import state_dict as sharded
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from dfformer.data.images import seed_everything
from dfformer.models.blocks import MetaFormerBlock
from dfformer.models.checkpoint import CheckpointError, must_fit
from dfformer.tasks.base import Task
from dfformer.tasks.evaluate import autocast
from dfformer.tasks.table import task_part
from dfformer.train.checks import flatten
from dfformer.train.config import FREE_TO_CHANGE, TrainConfig, parse
from dfformer.train.log import Log, interruption
from dfformer.train.state import checkpoints, load_latest_state, locked, optimizer_layout, save_state, weights
from dfformer.utils.device import DistContext, usable_device
from dfformer.utils.io import write_atomically
from dfformer.utils.text import echo, reason


def train_command(arguments: list[str]) -> int:
    """The command line's ``train``."""
    config = parse(arguments)
    with _processes(config) as context:
        try:
            train(config, context)
        except KeyboardInterrupt:
            if context.rank == 0:
                print(f"\n{interruption(Path(config.output), arguments, context.world > 1)}", file=sys.stderr)
            raise
    return 0


def train(config: TrainConfig, context: DistContext) -> list[dict[str, float]]:
    """Trains from the start, or from the latest checkpoint in ``config.output``; returns the measures by epoch."""
    folder = Path(config.output)
    with ExitStack() as held:
        _on_first(context, lambda: held.enter_context(locked(folder)))
        if not config.resume and (checkpoints(folder) or weights(folder)):
            raise ValueError(
                f"output: {folder} already contains a run; pass --resume=true to continue it, or another folder"
            )
        seed_everything(config.seed)
        task: Task = task_part(config.task, "training")(config, context)
        _on_first(context, task.check)
        return Engine(config, task, context).run()


@contextmanager
def _processes(config: TrainConfig) -> Iterator[DistContext]:
    """Joins the process group, if torchrun started this process."""
    kind = config.device if config.device != "auto" else ("cuda" if torch.cuda.is_available() else "cpu")
    if config.amp == "float16" and not kind.startswith("cuda"):
        raise ValueError("amp: float16 needs a CUDA device; on others, use none or bfloat16")
    rank = os.environ.get("LOCAL_RANK")
    if rank is None and config.distributed == "fsdp":
        raise ValueError("distributed: fsdp needs several processes; start them with torchrun")
    device = usable_device(f"cuda:{rank}" if rank and kind == "cuda" else kind)
    if rank is None:
        yield DistContext(device)
        return
    if device.type == "cuda":
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if device.type == "cuda" else "gloo")
    try:
        yield DistContext(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()


def _on_first(context: DistContext, check: Any) -> None:
    """Runs a check in the first process only, and raises its error in all processes."""
    failure: list[Exception | None] = [None]
    if context.rank == 0:
        try:
            check()
        except (ValueError, OSError) as error:
            failure = [error]
    if context.world > 1:
        distributed.broadcast_object_list(failure)
    if failure[0] is not None:
        raise failure[0]


class Engine:
    """Trains what a task defines."""

    def __init__(self, config: TrainConfig, task: Task, context: DistContext) -> None:
        self.config, self.task, self.context = config, task, context
        self.folder, self.first = Path(config.output), context.rank == 0
        self.model = _built(task).to(context.device)
        if config.model.grad_checkpointing:
            self.model.set_grad_checkpointing()  # type: ignore[operator]
        optim = config.optim
        self.ema = ModelEmaV3(self.model, decay=optim.ema_decay, use_warmup=True) if optim.ema_decay else None
        self.models = {"state_dict": self.model}  # by their key in checkpoints
        if self.ema:
            self.models["state_dict_ema"] = self.ema.module
        self.result = [*self.models.values()][-1]  # the model that is exported and drawn
        self.runner = self._distribute()
        self.optimizer = create_optimizer_v2(self.model, optim.opt, lr=optim.lr, weight_decay=optim.weight_decay)
        self.steps = task.batches.steps  # per epoch
        same = ("cooldown_epochs", "warmup_epochs", "warmup_lr", "min_lr", "decay_rate")  # names in timm and here
        self.scheduler, self.epochs = create_scheduler_v2(
            self.optimizer,
            sched=optim.schedule,
            num_epochs=optim.epochs,
            decay_milestones=optim.milestones,
            step_on_epochs=False,
            updates_per_epoch=self.steps,
            **{name: getattr(optim, name) for name in same},
        )
        self.scaler = torch.amp.GradScaler(context.device.type, enabled=config.amp == "float16")
        self.step = 0  # steps done, over all epochs
        self.loss_sum = 0.0  # over the steps done in this epoch
        self.history: list[dict[str, float]] = []
        self.resumed_from = self._resume() if config.resume else None

    def _distribute(self) -> nn.Module:
        if self.config.model.compile:
            # Inductor would take (B,H,W,C) for (B,C,H,W), see dfformer_kernels/ops/conv2d.py.
            self.model.compile(options={"layout_optimization": False})
        if self.context.world == 1:
            return self.model
        if self.config.distributed == "fsdp":
            for model in self.models.values():
                for block in [module for module in model.modules() if isinstance(module, MetaFormerBlock)]:
                    fully_shard(block)
                fully_shard(model)
            return self.model
        devices = [self.context.device] if self.context.device.type == "cuda" else None
        return DistributedDataParallel(self.model, device_ids=devices)

    def run(self) -> list[dict[str, float]]:
        """Trains to the end; returns the measures by epoch."""
        started = len(self.history)
        if self.first and started < self.epochs:
            self._announce()
        log = Log(self.step, self.history, self.config, self.task) if self.first else None
        loader = self.task.training_loader()
        with closing(log) if log else nullcontext():
            while len(self.history) < self.epochs:
                epoch = len(self.history)
                start = time.perf_counter()
                self._train_epoch(epoch, loader, log)
                seconds = time.perf_counter() - start
                row = {"epoch": epoch + 1, "step": self.step, "train_loss": self.loss_sum / self.steps}
                row |= {"lr": self.optimizer.param_groups[0]["lr"], **self._validate()}
                self.history.append(row)
                self.loss_sum = 0.0
                self._export()
                self._save()
                if log:
                    log.epoch(self.history, seconds)
        self._draw()
        if log:
            best = max(self.history, key=self.task.score)
            done = "this run was already complete" if started == self.epochs else "done"
            factor = 100 if self.task.unit == "%" else 1
            value = f"{factor * self.task.score(best):.2f} {self.task.unit}"
            score = f"best {self.task.metric} {value} after epoch {best['epoch']}"
            echo(f"{done}: {score}; see {self.folder}")
        return self.history

    def _train_epoch(self, epoch: int, loader: Any, log: Log | None) -> None:
        batches = self.task.batches
        batches.epoch, batches.first_step = epoch, self.step - epoch * self.steps
        self.runner.train()
        source = iter(loader)
        title = f"epoch {epoch + 1}/{self.epochs}"
        hidden = log is None or not sys.stderr.isatty()
        bar = tqdm(total=self.steps, initial=batches.first_step, desc=title, unit="step", leave=False, disable=hidden)
        with bar:
            for _ in range(batches.first_step, self.steps):
                loss, norm = self._train_step(list(islice(source, batches.accumulation)))
                bar.update()
                if log and (self.step % self.config.log_steps == 0 or self.step == 1):
                    lr = self.optimizer.param_groups[0]["lr"]
                    log.step({"step": self.step, "epoch": epoch + 1, "loss": loss, "lr": lr, "grad_norm": norm})
                    bar.set_postfix(loss=f"{loss:.3f}", lr=f"{lr:.1e}")
                if self.config.save_steps and self.step % self.config.save_steps == 0 and self.step % self.steps:
                    self._save()

    def _train_step(self, batches: list[Any]) -> tuple[float, float]:
        """One optimizer step; returns its loss over all processes and the norm of its gradient."""
        seed_everything(self.config.seed, self.step, self.context.rank)
        self.scheduler.step_update(self.step)
        self.optimizer.zero_grad()
        total = torch.zeros((), device=self.context.device)
        for part, batch in enumerate(batches):
            with self._gradients_stay_here(part < len(batches) - 1):
                with autocast(self.context.device, self.config.amp):
                    loss = self.task.loss(self.runner, batch) / len(batches)
                self.scaler.scale(loss).backward()
            total += loss.detach()
        total = self.context.add_up(total) / self.context.world
        self.scaler.unscale_(self.optimizer)
        norm = self._clip()
        self._must_be_finite(float(total), norm, batches)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        if self.ema:
            self.ema.update(self.model, self.step)
        self.loss_sum += float(total)
        return float(total), norm

    def _gradients_stay_here(self, stay: bool) -> Any:
        """Keeps gradients local in all but the last pass of a step, after which processes exchange them."""
        if isinstance(self.runner, DistributedDataParallel):
            return self.runner.no_sync() if stay else nullcontext()
        if self.context.world > 1:
            self.model.set_requires_gradient_sync(not stay)  # type: ignore[operator]
        return nullcontext()

    def _clip(self) -> float:
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.optim.clip_grad or math.inf)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm)

    def _must_be_finite(self, loss: float, norm: float, batches: list[Any]) -> None:
        """Raises RuntimeError before weights become bad. The scaler skips steps whose scaled gradients overflow."""
        if math.isfinite(loss) and (math.isfinite(norm) or self.scaler.is_enabled()):
            return
        bad = [name for name, p in self.model.named_parameters() if p.grad is not None and not p.grad.isfinite().all()]
        latest = checkpoints(self.folder)
        raise RuntimeError(
            f"step {self.step + 1}: the loss is {loss}, the gradient's norm {norm} at learning rate "
            f"{self.optimizer.param_groups[0]['lr']:.3g}; first module whose output is not finite: "
            f"{self._first_bad_module(batches) or 'none'}; parameters with bad gradients: "
            f"{len(bad)}{' (' + ', '.join(bad[:3]) + ', ...)' if bad else ''}; last good checkpoint: "
            f"{latest[-1] if latest else 'none'}. A lower optim.lr, optim.clip_grad=1 or a longer optim.warmup_epochs "
            "usually helps; with amp=float16, try bfloat16"
        )

    def _first_bad_module(self, batches: list[Any]) -> str:
        """The name of the first module whose output is not finite for the images of this step."""
        found: list[str] = []
        names = {module: name for name, module in self.model.named_modules()}

        def look(module: nn.Module, inputs: Any, output: Any) -> None:
            if isinstance(output, Tensor) and not output.isfinite().all():
                found.append(names[module] or "the model itself")

        hooks = [module.register_forward_hook(look) for module in names]
        seed_everything(self.config.seed, self.step, self.context.rank)
        try:
            with torch.no_grad(), autocast(self.context.device, self.config.amp):
                for batch in batches:
                    self.task.loss(self.model, batch)
        finally:
            for hook in hooks:
                hook.remove()
        return found[0] if found else ""

    def _validate(self) -> dict[str, float]:
        """Measures of the model, and of the averaged weights with the prefix ``ema_``."""
        row: dict[str, float] = {}
        for prefix, model in zip(("", "ema_"), self.models.values(), strict=False):
            with autocast(self.context.device, self.config.amp):
                measures = self.task.validate(model)
            row |= {f"{prefix}{name}": value for name, value in measures.items()}
        return row

    def _export(self) -> None:
        """Writes the latest weights and the best so far, for use."""
        tensors = _whole_weights(self.result)
        if self.first:
            self.task.export(tensors, self.folder / "last.safetensors")
            if self.task.score(self.history[-1]) > max(map(self.task.score, self.history[:-1]), default=-math.inf):
                self.task.export(tensors, self.folder / "best.safetensors")

    def _draw(self) -> None:
        self.result.eval()
        with autocast(self.context.device, self.config.amp):
            figure = self.task.picture(self.result)
        if figure and self.first:
            write_atomically(self.folder / "predictions.png", partial(figure.savefig, dpi=110))

    def _save(self) -> None:
        """Writes everything that `_resume` needs. The schedule and all randomness are functions of the step."""
        state = {
            **{name: _whole_weights(model) for name, model in self.models.items()},
            "optimizer": sharded.get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE),
            "scaler": self.scaler.state_dict(),
            "step": self.step,
            "loss_sum": self.loss_sum,
            "history": self.history,
            "config": json.dumps(asdict(self.config)),
        }
        if self.first:
            save_state(self.folder, self.step, state, self.config.keep)

    def _resume(self) -> Path | None:
        """Loads the latest readable checkpoint, if there is one; returns its path."""
        found = load_latest_state(self.folder)
        if found is None:
            return None
        path, state = found
        self._must_be_the_same_run(path, state)
        for name, model in self.models.items():
            must_fit(model, state.get(name, {}), path, exactly=True)
        try:
            # It is empty in other processes than the first.
            own = sharded.get_optimizer_state_dict(self.model, self.optimizer, options=_WHOLE)
            if own and optimizer_layout(state["optimizer"]) != optimizer_layout(own):
                raise ValueError("its parameters or their states are not those of this model")
            sharded.set_optimizer_state_dict(self.model, self.optimizer, state["optimizer"], options=_WHOLE)
            self.scaler.load_state_dict(state["scaler"])
        except Exception as error:  # torch ignores missing entries, and raises anything for others
            raise CheckpointError(f"{path}: optimizer, scaler: do not fit this run: {reason(error)}") from error
        for name, model in self.models.items():  # last: torch asks an optimizer for its state by a step, if of size 0
            sharded.set_model_state_dict(model, state[name], options=_WHOLE)
        self.step, self.loss_sum, self.history = state["step"], state["loss_sum"], state["history"]
        return path

    def _must_be_the_same_run(self, path: Path, state: dict[str, Any]) -> None:
        before, now = flatten(json.loads(state["config"])), flatten(json.loads(json.dumps(asdict(self.config))))
        names = before.keys() | now.keys()
        changed = sorted(name for name in names - FREE_TO_CHANGE if before.get(name) != now.get(name))
        if changed:
            raise ValueError(
                f"{path}: was written by a run with other settings: "
                + ", ".join(f"{name} was {before.get(name)}, is {now.get(name)}" for name in changed)
            )
        epochs, ended = len(state["history"]), state["history"][-1]["step"] if state["history"] else 0
        if ended != epochs * self.steps or not 0 <= state["step"] - ended < self.steps:
            raise ValueError(
                f"{path}: was written by a run with another number of training images: step {state['step']} after "
                f"{epochs} epochs, which have {self.steps} steps each here"
            )

    def _announce(self) -> None:
        optim, batches = self.config.optim, self.task.batches
        parameters = sum(p.numel() for p in self.model.parameters())
        print(
            f"{self.config.model.name}: {parameters / 1e6:.2f} M parameters on {self.context.device}\n"
            f"global batch {optim.global_batch} = {batches.batch} images x {self.context.world} processes x "
            f"{optim.accumulation} passes; {self.steps} steps an epoch, {self.epochs} epochs; "
            f"learning rate {optim.lr:g} for that batch"
        )
        if self.resumed_from:
            echo(f"resumes from {self.resumed_from}: step {self.step}, epoch {len(self.history) + 1}")


def _built(task: Task) -> nn.Module:
    try:
        return task.build_model()
    except TypeError as error:  # libraries raise it for unknown arguments
        raise ValueError(f"model.args, segment.decoder: {error}") from error


_WHOLE = sharded.StateDictOptions(full_state_dict=True, cpu_offload=True)


def _whole_weights(model: nn.Module) -> dict[str, Any]:
    """The state dict on the CPU, gathered from the shards of all processes; empty in all but the first process."""
    return sharded.get_model_state_dict(model, options=_WHOLE)
