"""``use_backend`` nests, and threads, tasks and generators do not meet."""

import asyncio
import contextvars
import threading
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from cases import OPS, Case, make_grad, make_inputs
from torch import Tensor

from dfformer_kernels import dispatch, mlp, use_backend

OP = OPS["star_relu"]


def run(backend: str | None = None) -> Tensor:
    return OP.public(make_inputs(OP, Case(1, 2, 3, 4), torch.float32, requires_grad=False), backend)


def test_use_backend_nests_and_restores(calls: list[str]) -> None:
    with use_backend("second"):
        with use_backend("first"):
            run()
        run()
    run()
    assert calls == ["first star_relu", "second star_relu", "first star_relu"]


def test_use_backend_restores_after_an_exception(calls: list[str]) -> None:
    with pytest.raises(KeyError), use_backend("second"):
        raise KeyError
    run()
    assert calls == ["first star_relu"]


def during(block: Callable[[], object], name: str) -> object:
    with use_backend(name):
        return block()


def test_blocks_of_overlapping_threads_do_not_meet(calls: list[str]) -> None:
    """Each begins and ends while the other is open, and a third thread has none."""
    barrier = threading.Barrier(3)

    def first() -> None:
        with use_backend("second"):
            barrier.wait()
            barrier.wait()
            run()
        barrier.wait()

    def second() -> None:
        barrier.wait()
        with use_backend("broken"):
            barrier.wait()
            barrier.wait()
        run()

    def third() -> None:
        barrier.wait()
        barrier.wait()
        barrier.wait()
        run()

    with ThreadPoolExecutor(3) as pool:
        for future in [pool.submit(f) for f in (first, second, third)]:
            future.result()
        assert pool.submit(dispatch.requested_backend, None).result() is None
    run()
    assert sorted(calls) == [*["first star_relu"] * 3, "second star_relu"]


def test_a_thread_takes_the_choice_along_when_it_is_told_to(calls: list[str]) -> None:
    with use_backend("second"), ThreadPoolExecutor(1) as pool:
        pool.submit(run).result()
        pool.submit(contextvars.copy_context().run, run).result()
    assert calls == ["first star_relu", "second star_relu"]


def test_blocks_of_generators_end_in_any_order(calls: list[str]) -> None:
    """A generator shares its caller's context: the one opened last counts, and nothing is left of either."""

    def open_block(name: str) -> Generator[None, None, None]:
        with use_backend(name):
            yield

    one, two = open_block("broken"), open_block("second")
    next(one)
    next(two)
    run()
    one.close()
    run()
    two.close()
    run()
    assert calls == ["second star_relu", "second star_relu", "first star_relu"]


@pytest.mark.parametrize("opened_here", [True, False])
def test_a_generator_that_ends_in_another_thread_leaves_nothing(calls: list[str], opened_here: bool) -> None:
    def open_block() -> Iterator[None]:
        with use_backend("second"):
            yield

    block: Any = open_block()
    with ThreadPoolExecutor(1) as pool:
        if opened_here:
            next(block)
            pool.submit(block.close).result()
        else:
            pool.submit(next, block).result()
            block.close()
        pool.submit(run).result()
        run()
    assert calls == ["first star_relu", "first star_relu"]


def test_tasks_do_not_meet(calls: list[str]) -> None:
    async def work(name: str | None) -> None:
        with use_backend(name) if name else nullcontext():
            await asyncio.sleep(0)
            run()
            await asyncio.sleep(0)

    async def main() -> None:
        await asyncio.gather(work("second"), work(None), work("second"))
        run()

    asyncio.run(main())
    assert sorted(calls) == ["first star_relu", "first star_relu", "second star_relu", "second star_relu"]


def test_backward_in_another_thread_runs_where_forward_ran(calls: list[str]) -> None:
    """As autograd's threads for GPUs, which have a context of their own."""
    inputs = make_inputs(OP, Case(1, 2, 3, 4), torch.float32)
    y = during(lambda: OP.public(inputs), "second")
    assert isinstance(y, Tensor)
    with ThreadPoolExecutor(1) as pool:
        pool.submit(y.backward, make_grad(OP, inputs)).result()
    assert calls == ["second star_relu", "second star_relu_backward"]


@pytest.mark.parametrize("named", [{"backend": "torch"}, {}], ids=["argument", "context"])
def test_an_mlps_star_relu_runs_on_the_named_backend_in_backward_too(
    named: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen: list[tuple[str, str]] = []
    select = dispatch.select

    def recording(problem: dispatch.Problem, name: str | None = None) -> dispatch.Backend:
        found = select(problem, name)
        chosen.append((problem.op, found.name))
        return found

    monkeypatch.setattr(dispatch, "select", recording)
    x, w1, w2 = (torch.randn(4, 4, requires_grad=True) for _ in range(3))
    with nullcontext() if named else use_backend("torch"):
        y = mlp(x, w1, (torch.ones(1), torch.zeros(1)), w2, **named)
    y.sum().backward()
    assert {op for op, _ in chosen} == {"star_relu", "star_relu_backward"}
    assert {name for _, name in chosen} == {"torch"}
