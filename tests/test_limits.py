"""More than 2^31 elements, and launches that fail: CUDA kernels run on the host."""

import ctypes
from contextlib import contextmanager

import on_host
import pytest
import torch

from pyflowkern import nn, ops

#: 2^31 + 2^27 elements; the last ones belong to the last block, also in a grid-stride loop of 65,536 blocks.
HUGE = (2176, 2, 2**19)


@pytest.fixture(scope="module")
def library():
    path = on_host.build()
    return path, ctypes.CDLL(str(path))


@contextmanager
def last_blocks(library, count):
    """Run only the last blocks of each launch; memory that they do not touch is never allocated by the system."""
    path, loaded = library
    loaded.pfk_only_last_blocks(ctypes.c_int64(count))
    try:
        with on_host.kernels(path):
            yield
    finally:
        loaded.pfk_only_last_blocks(ctypes.c_int64(0))


def logit(x):
    return ops.logit(x, alpha=0.05)[0]


def elementwise(x):
    return ops.affine(x, x, x)[0]


def normalized(x):
    return ops.actnorm(x, torch.tensor([0.1, -0.2]), torch.tensor([1.0, 2.0]))[0]


def log_prob(x):
    return ops.normal_log_prob(x)


def glow_step(x):
    weight = torch.tensor([[1.0, 0.5], [-0.5, 1.0]])
    return ops.glow_step(x, torch.tensor([0.1, 0.2]), torch.ones(2), weight, torch.tensor(0.5))[0]


def test_last_of_many_samples_of_a_glow_step(library):
    """Blocks take tiles in turn, so the last blocks write a few tiles of every sample; the rest stays 0."""
    x = torch.empty(HUGE, dtype=torch.bfloat16)
    x[-1] = torch.rand(HUGE[1:])
    with last_blocks(library, 8):
        got = glow_step(x)[-1]
    written = got != 0
    assert written.sum() >= 1024
    alone = glow_step(x[-1:].clone())[0]
    torch.testing.assert_close(got[written], alone[written], rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize("op", [logit, elementwise, normalized, log_prob])
def test_last_of_many_samples(library, op):
    x = torch.empty(HUGE, dtype=torch.bfloat16)
    x[-1] = torch.rand(HUGE[1:])
    with last_blocks(library, 512):
        got = op(x)[-1]
    torch.testing.assert_close(got, op(x[-1:].clone())[0], rtol=1e-2, atol=1e-2)


def test_last_of_many_samples_of_a_coupling(library):
    """Its parameters have rows half as long."""
    x, params = (torch.empty(HUGE, dtype=torch.bfloat16) for _ in range(2))
    x[-1], params[-1] = torch.rand(HUGE[1:]), torch.rand(HUGE[1:])
    with last_blocks(library, 512):
        got = ops.affine_coupling(x, params)[0][-1]
    alone = ops.affine_coupling(x[-1:].clone(), params[-1:].clone())[0][0]
    torch.testing.assert_close(got, alone, rtol=1e-2, atol=1e-2)


def test_last_of_many_samples_of_a_spline(library):
    """Its parameters have more than 2^32 elements."""
    smap = ops.SplineMap("linear", bins=2)
    x, params = (torch.empty((*HUGE, k), dtype=torch.bfloat16) for k in (1, smap.params))
    x, last = x.squeeze(-1), (-1, slice(None), slice(-(2**14), None))  # of each channel
    x[last] = torch.randn(2, 2**14)
    params[last] = torch.randn(2, 2**14, smap.params)
    with last_blocks(library, 1024):
        got = ops.spline(x, params, smap)[0][last]
    alone = ops.spline(x[last].clone(), params[last].clone(), smap)[0]
    written = got != 0
    assert written.sum() >= 2**13
    torch.testing.assert_close(got[written], alone[written], rtol=1e-2, atol=1e-2)


def test_last_of_many_samples_of_an_autoregressive_flow(library):
    plan = nn.MaskedMLP(2, 2, (3,)).plan
    weights = [torch.linspace(-1, 1, 6).view(3, 2), torch.linspace(-1, 1, 12).view(4, 3)]
    z = torch.empty(2**30 + 2**10, 2)
    z[-256:] = torch.randn(256, 2)

    def last(z):
        found = ops.autoregressive_inverse(z, weights, [torch.ones(3), None], plan)
        return [t[-256:] for t in found]

    with last_blocks(library, 32):
        got = last(z)
        alone = last(z[-256:].clone())
    torch.testing.assert_close(got, alone, rtol=0, atol=0)


def test_last_of_many_samples_of_a_trace(library):
    """Forward and backward; the layers of a field are mostly torch's matrix products."""
    e, je = (torch.empty(HUGE) for _ in range(2))
    e[-1], je[-1] = torch.randn(HUGE[1:]), torch.randn(HUGE[1:])
    je.requires_grad_()
    with last_blocks(library, 1):
        trace = ops.hutchinson_trace(e, je)
        assert torch.equal(trace[-1:], ops.hutchinson_trace(e[-1:].clone(), je[-1:].clone()))
    with last_blocks(library, 16):
        (grad,) = torch.autograd.grad(trace[-1], je)
    written = grad[-1] != 0
    assert written.sum() >= 2**12
    assert torch.equal(grad[-1][written], e[-1][written])


@pytest.mark.parametrize("op", [logit, elementwise])
def test_end_of_one_long_sample(library, op):
    x = torch.empty(1, 1, 2**31 + 2**13, dtype=torch.bfloat16)
    x[..., -8192:] = torch.rand(8192)
    with last_blocks(library, 4):
        got = op(x)[..., -8192:]
    torch.testing.assert_close(got, op(x[..., -8192:].clone()), rtol=1e-2, atol=1e-2)


def test_dequantize_draws_other_noise_beyond_32_bits(library):
    """A counter of 32 bits would repeat the noise of the first samples."""
    x = torch.zeros(HUGE, dtype=torch.uint8)
    with last_blocks(library, 512):
        y, _ = ops.dequantize(x, seed=1)
    noise = 256 * y[-1].double()
    assert noise.min() >= 0
    assert noise.max() < 1
    assert abs(noise.mean() - 0.5) < 1e-2
    wrapped = (y.numel() - 2**31) // 2**20 - 1  # the sample at the same place modulo 2^31
    first, _ = ops.dequantize(x[: wrapped + 1], seed=1)
    assert not torch.equal(first[-1], y[-1])


def test_a_failing_launch_names_the_op_and_the_shapes(library):
    path, loaded = library
    x = torch.randn(3, 4, requires_grad=True)
    with on_host.kernels(path):
        loaded.pfk_fail_next_launch()
        with pytest.raises(RuntimeError, match=r"actnorm.*\(3, 4\).*was to fail"):
            ops.actnorm(x, torch.zeros(4), torch.zeros(4))
        y, _ = ops.actnorm(x, torch.zeros(4), torch.zeros(4))
        loaded.pfk_fail_next_launch()
        with pytest.raises(RuntimeError, match=r"backward of pyflowkern::actnorm.*\(3, 4\)"):
            y.sum().backward()
        ops.actnorm(x, torch.zeros(4), torch.zeros(4))[0].sum().backward()
    assert x.grad is not None
