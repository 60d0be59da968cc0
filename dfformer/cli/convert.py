"""``dfformer convert``: a checkpoint as .safetensors."""

import argparse

from dfformer.models.checkpoint import convert


def convert_command(arguments: argparse.Namespace) -> int:
    print(f"wrote {convert(arguments.source, arguments.target)} tensors to {arguments.target}")
    return 0
