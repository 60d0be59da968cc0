"""Devices by name, and the processes of a run. A device that cannot be used is refused before anything else is done."""

from dataclasses import dataclass

import torch
from torch import Tensor, distributed


@dataclass(frozen=True)
class DistContext:
    """This process's device and rank, and the number of processes."""

    device: torch.device
    rank: int = 0
    world: int = 1

    def add_up(self, values: Tensor) -> Tensor:
        """Adds up ``values`` of all processes, in place."""
        if self.world > 1:
            distributed.all_reduce(values)
        return values


def usable_device(name: str) -> torch.device:
    """The device called ``name`` in torch, e.g. ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ValueError: the device cannot be used here; the message says why.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts
        raise ValueError(
            f"device: expected one that can be used here, got {name!r}: {str(error).splitlines()[0]}"
        ) from error
    return device
