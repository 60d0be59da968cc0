"""Devices by name. A device that cannot be used is refused before anything else is done."""

import torch


def usable_device(name: str) -> torch.device:
    """The device called ``name`` in torch, e.g. ``cpu``, ``cuda`` or ``cuda:1``.

    Raises:
        ValueError: the device cannot be used here; the message says why.
    """
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # the meta device has no values
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts
        raise ValueError(f"device: got {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return device
