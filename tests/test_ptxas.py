"""What ptxas said when the CUDA kernels were built: nothing leaves the registers."""

import re
import shutil
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SOURCES = sorted(ROOT.glob("csrc/*/*_cuda.cu"))
ENTRY = re.compile(
    r"Compiling entry function '(\S+)' for '(sm_\d+)'.*?"
    r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads",
    re.DOTALL,
)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: the kernels were not built")
@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)
def test_no_kernel_uses_the_stack_or_spills(source):
    reports = sorted(
        ROOT.glob(f"build/*/ptxas/{source.stem}.txt"), key=lambda p: p.stat().st_mtime
    )
    assert reports, "no report of the build: `make build` writes it"
    kernels = ENTRY.findall(reports[-1].read_text())
    assert {arch for _, arch, *_ in kernels} >= {"sm_80", "sm_90"}
    for name, arch, *used in kernels:
        assert used == ["0", "0", "0"], f"{name} for {arch}"
