"""actnorm and channel_moments: value, gradients, log-det, moments that cancellation cannot spoil."""

import pytest
import torch
from cases.actnorm import SHAPES, sample
from laws import normal

from pyflowkern.ops import actnorm, actnorm_reference, channel_moments


def test_compiled_forward_derivative():
    """Below the compiler too a tangent goes through the reference, as in eager mode."""
    x, s, b = sample((3, 4), torch.float64).tensors.values()

    def tangent(v):
        return torch.func.jvp(lambda w: actnorm(w, s, b)[0], (v,), (torch.ones_like(v),))[1]

    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), tangent(x))
    torch.testing.assert_close(tangent(x), s.exp().expand(3, 4))


def test_log_dets_are_writable():
    """They are running sums in many flows."""
    for function in (actnorm, actnorm_reference):
        _, log_det = function(**sample((3, 4), torch.float64).tensors)
        log_det += 1


def test_inverse_undoes_forward(backend):
    x, *rest = sample((3, 4, 5, 5), torch.float64).tensors.values()
    y, log_det = actnorm(x, *rest)
    back, minus = actnorm(y, *rest, inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)
    assert torch.equal(minus, -log_det)


@pytest.mark.parametrize("shape", [s for s in SHAPES if all(s)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments_at_any_mean(backend, shape, mean):
    """In float32 the sum of squares of data near 1e4 has no digit of a variance of 1 left: Chan's merging has all."""
    x = (normal(*shape) + mean).float()
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    axes = [d for d in range(x.dim()) if d != 1]
    variance, average = torch.var_mean(x.double(), axes, correction=0)
    for v in layouts:
        m, s = channel_moments(v)
        torch.testing.assert_close(m.double(), average, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(s.double(), variance, rtol=1e-3, atol=1e-6)


def test_moments_of_nothing_are_nan():
    assert all(t.isnan().all() for t in channel_moments(torch.zeros(0, 3)))


def test_a_batch_has_channels():
    with pytest.raises(ValueError, match="batch axis"):
        actnorm(torch.zeros(3), torch.zeros(3), torch.zeros(3))
