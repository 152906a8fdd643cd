"""The CUDA kernels as compiled: no spills, and data moves once, in packs of 16 bytes."""

import math
import shutil
import sys
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package

from bench import _kernels, _traffic

needs_nvcc = pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc: nothing was built")
SOURCES = sorted(path.stem for path in _kernels.ROOT.glob("csrc/*/*_cuda.cu"))


@pytest.fixture(scope="module")
def kernels():
    return _kernels.kernels()


@needs_nvcc
@pytest.mark.parametrize("source", SOURCES)
def test_no_kernel_uses_the_stack_or_spills(kernels, source):
    found = [k for k in kernels if k.source == source]
    # wheels have sm_80 as well, see CUDA_CODE in the Makefile
    assert "sm_90" in {k.arch for k in found}, "no report of the build"
    assert not [(k.name, k.arch) for k in found if k.stack or k.spills]


@needs_nvcc
def test_occupancy_is_at_least_an_eighth(kernels):
    """Fewer warps could not hide the latency of memory."""
    assert not [(k.name, k.arch, k.occupancy) for k in kernels if k.occupancy < 0.125]


@needs_nvcc
def test_no_pack_is_split(kernels):
    """The counts on the host cannot show it: there a pack is always one access."""
    assert any(loop["st", 16] for k in kernels for loop in k.loops)
    assert not [(k.name, k.arch) for k in kernels if k.taken_apart]


SASS = """
arch = sm_90
\t\tFunction : first
        /*0000*/                   MOV R1, c[0x0][0x28] ;              /* 0x00000a0000017a02 */
        /*0010*/                   LDG.E.128 R8, desc[UR8][R2.64] ;    /* 0x0000000802087981 */
        /*0020*/                   STG.E desc[UR8][R4.64], R8 ;        /* 0x0000000804007986 */
        /*0030*/              @!P1 BRA 0x10 ;                          /* 0xfffffd1000008947 */
        /*0040*/                   STG.E.U8 desc[UR8][R4.64], R8 ;     /* 0x0000000804007986 */
        /*0050*/                   EXIT ;                              /* 0x000000000000794d */
        /*0060*/                   BRA 0x60;                           /* 0xfffffffc00fc7947 */
"""


def test_reading_machine_code():
    """In the output of cuobjdump branches have addresses, not labels."""
    (loop,) = _kernels._accesses_in_sass(SASS)["first", "sm_90"]
    assert loop == {("ld", 16): 1, ("st", 4): 1}
    assert _kernels.Kernel("", "first", "sm_90", 1, 0, 0, 0, loops=[loop]).taken_apart


def test_occupancy_of_an_unknown_architecture():
    assert math.isnan(_kernels.Kernel("", "", "sm_999", 32, 0, 0, 0, threads=256).occupancy)
    assert _kernels.Kernel("", "", "sm_120", 32, 0, 0, 0, threads=256).occupancy == 1


@pytest.mark.parametrize("case", _traffic.CASES, ids=_traffic._name)
def test_data_moves_once_and_in_packs(case):
    for dtype in _traffic.dtypes(case):
        t = _traffic.count(case, dtype)
        assert t.scalar_share == 0, t
        # the Glow step's backward reads grad_y in two kernels: four streams where three must move
        assert t.moved <= (1.34 if "glow" in case.name and case.backward else 1.01) * t.floor, t


def test_counting_sees_scalar_accesses_and_what_moves_twice():
    """Rows of odd length do not divide into packs; one pass too many doubles the bytes."""
    odd = _traffic.TrafficCase("odd", _traffic._normal((8, 3, 5, 7)), _traffic.ops.logit)
    t = _traffic.count(odd, _traffic.torch.float32)
    assert t.scalar_share == 1
