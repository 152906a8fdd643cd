"""The backends every op test runs on.

The reference, the CPU kernels at each SIMD level, the CUDA kernels compiled for the host, CUDA.
"""

import ctypes
import sys
from contextlib import contextmanager

import on_host
import pytest
import torch

from pyflowkern import _library, use_reference

# small tensors gain nothing from threads, and lose much where others use the processor
torch.set_num_threads(1)


def pytest_collection_modifyitems(items):
    """Begin with the slow ones: a process that begins one last is alone at the end."""
    items.sort(key=lambda item: item.get_closest_marker("slow") is None)


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
