"""The kernels on aarch64: a cross compiler accepts them, and their formulas run under an emulator.

Whole ops would need torch for aarch64; the workflow of the wheels runs them on such a machine.
"""

import shutil
import subprocess
from pathlib import Path

import numpy as np
import pytest
import torch
from core.test_math import EXACT, LIMITS, arguments

ROOT = Path(__file__).resolve().parents[1]
SOURCES = sorted(ROOT.glob("csrc/*/*_cpu.cpp"))
COMPILER = next(
    (c for n in ("", "-12", "-13", "-14") if (c := shutil.which(f"aarch64-linux-gnu-g++{n}"))),
    None,
)
EMULATOR = shutil.which("qemu-aarch64-static") or shutil.which("qemu-aarch64")
FLAGS = (
    *("-std=gnu++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math"),
    *("-Wall", "-Wextra", "-Wno-psabi", "-Werror", f"-I{ROOT / 'csrc'}"),
    *("-DPFK_SIMD_NAMESPACE=baseline", "-DPFK_SIMD_LEVEL=0", "-DPFK_SIMD_LEVELS=1"),
)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(COMPILER is None, reason="needs a C++ cross compiler for aarch64"),
]


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    """Return a function that runs the program of functors under the emulator."""
    if EMULATOR is None:
        pytest.skip("needs qemu-user for aarch64")
    path = tmp_path_factory.mktemp("aarch64") / "functors"
    sources = [ROOT / "csrc/core/math_cpu.cpp", ROOT / "tests/aarch64/functors.cpp"]
    subprocess.run([COMPILER, *FLAGS, "-O2", "-static", *sources, "-o", path], check=True)

    def run(*words, data=b""):
        return subprocess.run([EMULATOR, path, *words], input=data, capture_output=True)

    return run


@pytest.mark.parametrize("name", LIMITS)
def test_elementary_functions(program, name):
    """As exact as on this processor, which tests/core/test_math.py asks."""
    x = arguments(name, np.float32)[::8]
    done = program("math", str(list(LIMITS).index(name)), data=x.astype(np.float64).tobytes())
    assert done.returncode == 0
    single = np.frombuffer(done.stdout, np.float32, x.size)
    double = np.frombuffer(done.stdout, np.float64, x.size, offset=single.nbytes)
    for y in (single, double):
        wide = x.astype(np.longdouble)
        with np.errstate(all="ignore"):
            exact = EXACT[name](wide)
            rounded = exact.astype(y.dtype)
        normal = np.isfinite(rounded) & (np.abs(rounded) > np.finfo(y.dtype).tiny)
        assert normal.sum() > x.size // 2
        spacing = np.spacing(np.abs(rounded[normal])).astype(np.longdouble)
        ulp = np.abs(y[normal].astype(np.longdouble) - exact[normal]) / spacing
        assert ulp.max() <= LIMITS[name], f"{y.dtype}: {float(ulp.max()):.2f} ulp"


def test_formulas_of_families(program):
    """Vectors of float32 against scalars of float64, and round trips; the program knows the limits."""
    done = program("families")
    report = done.stdout.decode()
    assert done.returncode == 0, report
    assert len(report.splitlines()) == 4 * 8 + 6


def test_kernels_compile():
    """Every source, against torch's headers, which are the same for all processors; a warning is an error."""
    assert len(SOURCES) > 15
    headers = Path(torch.__path__[0]) / "include"
    for source in SOURCES:
        command = [COMPILER, *FLAGS, "-O1", "-fsyntax-only", f"-isystem{headers}"]
        version = "-DTORCH_TARGET_VERSION=0x020b000000000000"
        done = subprocess.run([*command, version, source], capture_output=True, text=True)
        assert done.returncode == 0, f"{source.name}:\n{done.stderr[-4000:]}"
