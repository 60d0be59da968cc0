"""Which instruction set the compiled core uses, and that no other gets into its object code."""

import os
import shutil
import subprocess
from pathlib import Path
from types import ModuleType

import pytest
from conftest import require
from native_core import ISAS, X86, run_script
from paths import ROOT

CSRC = ROOT / "csrc"


def test_best_instruction_set_comes_first_and_is_active(core: ModuleType) -> None:
    assert [isa for isa in ISAS if isa in core.supported_isas()] == core.supported_isas()
    if not os.environ.get("DFFORMER_CPU_ISA"):
        assert core.active_isa() == core.supported_isas()[0]


def test_unknown_instruction_set_raises_naming_the_known_ones(core: ModuleType) -> None:
    active = core.active_isa()
    with pytest.raises(
        ValueError, match=f"isa: expected what this machine runs, {', '.join(core.supported_isas())}, got 'mmx'"
    ):
        core.set_active_isa("mmx")
    assert core.active_isa() == active


REPORT_ISA = """
from dfformer_kernels.backend import cpu
print(cpu.core().active_isa())
"""


def test_environment_names_the_instruction_set(core: ModuleType) -> None:
    last = core.supported_isas()[-1]
    done = run_script(REPORT_ISA, DFFORMER_CPU_ISA=last)
    assert done.stdout.split() == [last], done.stderr


@pytest.mark.usefixtures("core")
def test_environment_with_an_unknown_instruction_set_raises() -> None:
    done = run_script(REPORT_ISA, DFFORMER_CPU_ISA="mmx")
    assert done.returncode == 1
    assert "ValueError: DFFORMER_CPU_ISA: isa: expected what this machine runs, " in done.stderr


UNITS = {"isa_baseline": "xmm", "isa_avx2": "ymm", "isa_avx512": "zmm"} if X86 else {"isa_baseline": "v"}


@pytest.fixture(scope="session")
def objects(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Each instruction set's translation unit, compiled alone."""
    tools = [tool for tool in ("g++", "nm", "objdump") if not shutil.which(tool)]
    require("cpu", not tools, f"{', '.join(tools)} not installed")
    folder = tmp_path_factory.mktemp("objects")
    flags = [
        "-std=c++20",
        "-O3",
        "-w",
        "-fPIC",
        "-fno-math-errno",
        "-fvisibility=hidden",
        "-Wno-psabi",
    ]
    outputs = {unit: folder / f"{unit}.o" for unit in UNITS}
    compilers = [
        subprocess.Popen(["g++", *flags, "-c", str(CSRC / "cpu" / f"{unit}.cpp"), "-o", str(output)])
        for unit, output in outputs.items()
    ]
    assert [compiler.wait() for compiler in compilers] == [0] * len(UNITS)
    return outputs


@pytest.mark.slow  # compiles for minutes
@pytest.mark.parametrize("unit", UNITS)
def test_no_instruction_set_leaks_into_another_by_a_shared_symbol(objects: dict[str, Path], unit: str) -> None:
    """The linker keeps one copy of a weak or unique symbol, perhaps that of a wider instruction set."""
    listing = subprocess.run(["nm", "-C", objects[unit]], capture_output=True, text=True, check=True).stdout
    defined = [line.split(maxsplit=2)[1:] for line in listing.splitlines() if not line.startswith(" ")]
    assert f"dfformer::cpu::{unit.removeprefix('isa_')}_kernels" in [name for _, name in defined]
    assert [name for kind, name in defined if kind in "WVu"] == []


@pytest.mark.slow
@pytest.mark.skipif(not X86, reason="NEON has registers of one width")
@pytest.mark.parametrize(("unit", "register"), UNITS.items())
def test_a_unit_uses_its_registers_and_no_wider_ones(objects: dict[str, Path], unit: str, register: str) -> None:
    code = subprocess.run(["objdump", "-d", objects[unit]], capture_output=True, text=True, check=True).stdout
    assert next(wide for wide in ("zmm", "ymm", "xmm") if f"%{wide}" in code) == register
