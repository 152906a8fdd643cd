"""The backends every op test runs on: the reference, the CPU kernels at each SIMD level, CUDA."""

import pytest
import torch

from pyflowkern import _library, use_reference


@pytest.fixture(autouse=True)
def _one_thread_and_seed():
    torch.manual_seed(0)


def _cpu(level):
    return pytest.param(level, id=f"cpu-{level}")


@pytest.fixture(
    params=[
        "reference",
        *(_cpu(level) for level in _library.SIMD_LEVELS),
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
        yield torch.device("cuda")
        return
    before = _library.simd_level()  # raises, and so fails, where the kernels were not built
    try:
        if _library.simd_level(request.param) != request.param:
            pytest.skip(f"this processor lacks {request.param}")
        yield torch.device("cpu")
    finally:
        _library.simd_level(before)
