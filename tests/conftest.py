"""The backends every op test runs on.

The reference, the CPU kernels at each SIMD level, the CUDA kernels compiled for the host, CUDA.
"""

import ctypes
import gc
import os
import sys
from contextlib import contextmanager

# before torch reads them: threads that wait leave the processor to other tests, and Inductor takes the processor's word
# for its instructions in place of compiling a program for each kind
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("TORCHINDUCTOR_VEC_ISA_OK", "1")

import on_host
import pytest
import torch

import pyflowkern
from pyflowkern import _library, _memory, use_reference

# Trainings keep memory for the rest of their process, which other tests share: some take gigabytes, and some
# want memory of which nothing was written.  What it does is tested in a process of its own.
pyflowkern.keep_memory = _memory.keep_memory = lambda: True

# small tensors gain nothing from threads, and lose much where others use the processor
torch.set_num_threads(1)

gc.disable()  # while tests are collected; see pytest_collection_finish


def pytest_configure(config):
    config.collected = set()


def pytest_collectstart(collector):
    """Note each file: one that skips itself, for want of a library, has no tests that could tell of it."""
    if isinstance(collector, pytest.File):
        collector.config.collected.add(collector.nodeid)


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config, items):
    """Begin with the slow ones: a process that begins one last is alone at the end.

    The names of those that need a GPU are kept as they were before ``-m`` left some out.
    """
    config.gpu_tests = [item.nodeid for item in items if item.get_closest_marker("gpu")]
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


def pytest_collection_finish():
    """Let the collector of garbage pass over all that is there until the end: the tests, torch, compilers' modules.

    Else it looks at a million objects again and again, a fifth of the time of tests that compile graphs.
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(20_000, 10, 10)
    gc.enable()


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if dynamo := sys.modules.get("torch._dynamo"):
        dynamo.reset()  # else the compiled flows of many tests together reach the limit of one function


def _cpu(level):
    return pytest.param(level, id=f"cpu-{level}")


@contextmanager
def _fresh_memory_is_nan():
    """Fill the outputs of the CPU kernels with NaN before they run: what no kernel writes shows."""
    library = ctypes.CDLL(str(_library._loaded["cpu"]))
    # a library of before this switch has none; tests/ops/test_memory.py wants it
    switch = getattr(library, "pyflowkern_fresh_is_nan", lambda on: on)
    before = switch(1)
    try:
        yield
    finally:
        switch(before)


@pytest.fixture(scope="session")
def cuda_on_host():
    return on_host.build()


@pytest.fixture(
    params=[
        "reference",
        *(_cpu(level) for level in _library.SIMD_LEVELS),
        "cuda_on_host",
        pytest.param("cuda", marks=pytest.mark.gpu),
    ]
)
def backend(request):
    """Run the test on one backend; its value is the device that inputs belong on."""
    if request.param == "reference":
        with use_reference():
            yield torch.device("cpu")
        return
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        _library.require_kernels("cuda")
        with torch.device("cuda"):  # where tests create their tensors
            yield torch.device("cuda")
        return
    if request.param == "cuda_on_host":
        with on_host.kernels(request.getfixturevalue("cuda_on_host")):
            yield torch.device("cpu")
        return
    if request.param == "cpu":  # at the level of this processor
        _library.require_kernels("cpu")
        yield torch.device("cpu")
        return
    before = _library.simd_level()  # raises, and so fails, where the kernels were not built
    try:
        if _library.simd_level(request.param) != request.param:
            pytest.skip(f"this processor lacks {request.param}")
        with _fresh_memory_is_nan():
            yield torch.device("cpu")
    finally:
        _library.simd_level(before)
