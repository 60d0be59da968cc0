"""What an installed wheel must do: installed.py core|pure [FOLDER that it must run from].

With the compiled core nothing warns; without it the first filter step does, once.
"""

import sys
import warnings
from pathlib import Path

import torch

import dfformer_kernels
from dfformer.train.recipes import find_recipe
from dfformer_kernels import backends, dynamic_filter, star_relu
from dfformer_kernels.backend.cuda.sources import cuda_sources


def main(kind: str, folder: str = "") -> None:
    assert dfformer_kernels.__file__.startswith(folder), dfformer_kernels.__file__
    scale, bias = torch.tensor([0.5]), torch.tensor([1.0])
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        assert star_relu(torch.tensor([-2.0, 2.0]), scale, bias).tolist() == [1, 3]
        y = dynamic_filter(torch.ones(1, 4, 4, 2), torch.zeros(1, 3, 2), torch.ones(4, 3, 3, 2), (scale, bias))
    torch.testing.assert_close(y, torch.full_like(y, 1.5))
    assert (not backends()["cpu"], len(seen)) == {"core": (True, 0), "pure": (False, 1)}[kind], backends()["cpu"]
    if sys.platform == "linux":  # a second OpenMP runtime would have threads of its own
        mapped = {line.split()[-1] for line in Path("/proc/self/maps").read_text().splitlines() if "libgomp" in line}
        assert len(mapped) == 1, mapped
    package = Path(dfformer_kernels.__file__).parent.parent / "dfformer"
    assert find_recipe("digits") == package / "recipes" / "digits.yaml"
    print(kind, *sorted(cuda_sources()))


if __name__ == "__main__":
    main(*sys.argv[1:])
