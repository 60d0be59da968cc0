"""Devices by name, refused before anything else is done where they cannot be used."""

import torch


def usable_device(name: str) -> torch.device:
    """The device called ``name``, as torch writes them: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        ValueError: there is no such device here, and why.
    """
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:  # a torch without CUDA asserts
        raise ValueError(f"device: got {name!r}, which cannot be used here: {str(error).splitlines()[0]}") from error
    return device
