"""Memory that nobody filled: the laws run on fresh outputs full of NaN, and on sizes and masks of nothing."""

import ctypes

import torch
from laws import few_elements, normal

from pyflowkern import _library, ops


def test_fresh_memory_of_the_cpu_kernels_is_full_of_nan():
    """The fixture ``backend`` relies on this switch of the library."""
    library = ctypes.CDLL(str(_library._loaded["cpu"]))
    x = torch.zeros(2, 3)
    before = library.pyflowkern_fresh_is_nan(1)
    try:
        unread = torch.ops.pyflowkern.normal_log_prob_backward(torch.ones(2), x, None, None, 1)
        assert unread[0].isfinite().all()  # what kernels write is written
        assert library.pyflowkern_fresh_is_nan(1) == 1
    finally:
        library.pyflowkern_fresh_is_nan(before)


def test_masks_that_transform_nothing(backend):
    smap = ops.SplineMap(bins=3)
    for shape, mask, swap in few_elements():
        if isinstance(mask, torch.Tensor) and not (mask ^ swap).any():
            n, c, *space = shape
            for op, size, options in (
                (ops.spline_coupling, smap.params, (smap,)),
                (ops.affine_coupling, 2, ()),
            ):
                x, params = normal(*shape), normal(n, c * size, *space)
                y, log_det = op(x, params, *options, split=mask, swap=swap)
                assert torch.equal(y, x)
                assert not log_det.any()
