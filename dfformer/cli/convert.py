"""``dfformer convert``: a checkpoint as .safetensors."""

import argparse

from dfformer.models.checkpoint import convert
from dfformer.utils.text import echo


def convert_command(arguments: argparse.Namespace) -> int:
    echo(f"wrote {convert(arguments.source, arguments.target)} tensors to {arguments.target}")
    return 0
