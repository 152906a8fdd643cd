"""The host execution of CUDA detects mistakes: each kernel here makes one."""

import ctypes
import math
import re
import shutil
import subprocess
import sys

import on_host
import pytest
import torch

MISTAKES = [
    "forgets the last element",
    "reads what nobody wrote",
    "barrier in a branch",
    "shuffle without a lane",
    "lane beside its mask",
    "pack across a boundary",
    "votes and atomics",  # correct
]


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    sources = tmp_path_factory.mktemp("csrc")
    shutil.copytree(on_host.ROOT / "csrc" / "core", sources / "core")
    (sources / "mistakes").mkdir()
    shutil.copy(on_host.SOURCES / "mistakes.cu", sources / "mistakes" / "mistakes_cuda.cu")
    return on_host.build(name="mistakes", CSRC=str(sources), FAMILIES="mistakes")


def make(library, mistake, n=256):
    run = ctypes.CDLL(str(library)).pfk_mistake
    run.restype = ctypes.c_char_p
    out = torch.full((n,), math.nan)
    error = run(MISTAKES.index(mistake), ctypes.c_void_p(out.data_ptr()), n)
    return out, error.decode()


def test_an_element_that_nobody_writes(library):
    """New outputs are full of NaN (here the test fills them)."""
    out, error = make(library, "forgets the last element")
    assert not error
    assert out.isnan().nonzero().flatten().tolist() == [255]


def test_shared_memory_that_nobody_wrote(library):
    for _ in range(2):  # the second time, nothing of the first launch may be left
        out, error = make(library, "reads what nobody wrote")
        assert not error
        assert out.isnan().nonzero().flatten().tolist() == [0]


@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("barrier in a branch", r"threads wait at .*:\d+ and at .*:\d+"),
        ("shuffle without a lane", "names a lane that is not there"),
        ("lane beside its mask", "called by a lane that its mask leaves out"),
    ],
)
def test_threads_that_do_not_meet(library, mistake, message):
    _, error = make(library, mistake)
    assert re.search(message, error)


def test_votes_and_atomics(library):
    out, error = make(library, "votes and atomics")
    assert not error
    assert out[:5].tolist() == [16, 1, 0, 255 * 256 / 2, 255]


def test_a_misaligned_pack_traps(library):
    code = (
        "import ctypes, sys; memory = (ctypes.c_float * 64)()\n"
        "start = ctypes.addressof(memory); start += -start % 16\n"
        "ctypes.CDLL(sys.argv[1]).pfk_mistake(5, ctypes.c_void_p(start), 8)"
    )
    done = subprocess.run([sys.executable, "-c", code, str(library)], capture_output=True)
    assert done.returncode < 0, "the process did not trap"
