"""Activations in plain PyTorch: accurate far out, differentiable twice, and those of the kernels."""

import numpy as np
import pytest
import torch
from laws import normal

from pyflowkern import nn, use_reference
from pyflowkern.core.activations import ACTIVATIONS, activation_and_slope

FAR = [-700.0, -40.0, -38.0, -20.0, -12.0, -8.0, -1.0, 0.0, 0.5, 8.0, 19.5, 20.5, 30.0, 36.0, 41.0]
#: Rounding error of a second derivative: that of 1, multiplied by x in torch's silu.
BEND = 41 * 2.0**-52
#: x Phi(x), computed with 40 digits.
GELU = {
    -20.0: -5.507248237212468e-88,
    -12.0: -2.1317785344932147e-32,
    -8.0: -4.976768459417427e-15,
    -1.0: -0.15865525393145705,
    0.5: 0.34573123063700656,
}


def doubles(values):
    return torch.tensor(values, dtype=torch.float64)


def test_softplus_has_no_threshold():
    found = ACTIVATIONS["softplus"](doubles(FAR)).numpy()
    exact = np.logaddexp(np.longdouble(0), np.array(FAR, dtype=np.longdouble))
    np.testing.assert_allclose(found, exact.astype(float), rtol=1e-15)


def test_gelu_keeps_its_left_tail():
    # an error of half a unit of x / sqrt(2) is multiplied by x^2
    found = ACTIVATIONS["gelu"](doubles(list(GELU)))
    torch.testing.assert_close(found, doubles(list(GELU.values())), rtol=1e-13, atol=0)


@pytest.mark.parametrize("name", ACTIVATIONS)
def test_slopes_are_derivatives(name):
    """At a kink, too, which lies at 0: that from the left."""
    x = doubles([*FAR, *([800.0] if name == "elu" else [])]).requires_grad_()
    value, slope = activation_and_slope(x, name)
    assert torch.equal(value, ACTIVATIONS[name](x))
    (found,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    torch.testing.assert_close(found, slope, rtol=1e-14, atol=1e-15)
    if name in ("identity", "relu", "leaky_relu"):
        assert not slope.requires_grad
        return
    (bend,) = torch.autograd.grad(found.sum(), x, retain_graph=True)
    (expected,) = torch.autograd.grad(slope.sum(), x)
    known = x != 0 if name == "elu" else slice(None)  # its slope has a kink there
    torch.testing.assert_close(bend[known], expected[known], rtol=1e-13, atol=BEND)


@pytest.mark.parametrize("name", ["softplus", "gelu", "silu"])
def test_transforms_and_compilers_take_them(name):
    f, x = ACTIVATIONS[name], doubles(FAR)
    y, tangent = torch.func.jvp(f, (x,), (torch.ones_like(x),))
    torch.testing.assert_close(tangent, activation_and_slope(x, name)[1], rtol=1e-14, atol=1e-15)
    bend = torch.func.vmap(torch.func.grad(torch.func.grad(f)))(x)
    forward = torch.func.jvp(
        lambda v: activation_and_slope(v, name)[1], (x,), (torch.ones_like(x),)
    )
    torch.testing.assert_close(bend, forward[1], rtol=1e-13, atol=BEND)
    torch.testing.assert_close(torch.compile(f, fullgraph=True, backend="aot_eager")(x), y)
    half = f(x.bfloat16())
    assert half.dtype == torch.bfloat16
    torch.testing.assert_close(half.double(), f(x.bfloat16().double()), rtol=2**-8, atol=1e-40)


@pytest.mark.parametrize(
    ("name", "bias"), [("softplus", 20.5), ("softplus", 30.0), ("softplus", 39.0), ("gelu", -8.0)]
)
def test_a_network_and_its_inverse_are_one_function_far_out(name, bias):
    """Hidden units all far out; what is left out in forward() is missing in the inverse of the kernel."""
    torch.manual_seed(0)
    layer = nn.MaskedAutoregressive(4, (8,), transform="additive", activation=name).double()
    first, last = layer.conditioner.layers
    with torch.no_grad():
        first.bias.fill_(bias)
        first.weight.mul_(0.2)
        # large linear parts cancel, and what is left of tiny values is of order one
        last.weight[:] = doubles([1.0, -1.0]).repeat(4)
        if bias < 0:
            last.weight /= ACTIVATIONS[name](doubles(bias)).abs()
    x = normal(6, 4).clamp(-1, 1)
    z, _ = layer(x)
    assert (z - x)[:, -1].abs().min() > 1e-3
    back, _ = layer.inverse(z)
    with use_reference():
        reference, _ = layer.inverse(z)
    torch.testing.assert_close(back, reference, rtol=1e-13, atol=1e-13)
    torch.testing.assert_close(back, x, rtol=1e-13, atol=1e-13)
