"""Runs a script of timm, or any other, with this package's model names known to ``timm.create_model``:

    python -m dfformer.timm train.py DATA --model dfformer_s18 ...
    torchrun --nproc-per-node 8 -m dfformer.timm train.py DATA --model dfformer_s18 ...

The script runs as ``python train.py DATA ...`` would run it; ``-m package.module`` instead of a file runs a module.
"""

import runpy
import sys
from pathlib import Path

import dfformer  # noqa: F401 (registers the models)

USAGE = "usage: python -m dfformer.timm (SCRIPT | -m MODULE) [ARGUMENTS of the script]"


def main(arguments: list[str]) -> None:
    """Runs the script or module that ``arguments`` start with, on those after it; SystemExit if there is none."""
    if arguments[:1] == ["-m"] and len(arguments) > 1:
        sys.argv[:] = arguments[1:]
        runpy.run_module(arguments[1], run_name="__main__", alter_sys=True)
    elif arguments and not arguments[0].startswith("-"):
        script = Path(arguments[0])
        if not script.is_file():
            raise SystemExit(f"SCRIPT: got {script}, which is not a file\n{USAGE}")
        sys.argv[:] = arguments
        sys.path[0] = str(script.resolve().parent)  # as Python itself does, for what stands beside the script
        runpy.run_path(str(script), run_name="__main__")
    elif arguments[:1] in (["-h"], ["--help"]):
        print(USAGE)
    else:
        raise SystemExit(USAGE)


if __name__ == "__main__":
    main(sys.argv[1:])
