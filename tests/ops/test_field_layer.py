"""Layers after a product: against forward mode through plain PyTorch, autograd and float64."""

import itertools

import pytest
import torch
from cases.field_layer import sample

from pyflowkern import _library
from pyflowkern.ops import field_layer, field_layer_reference
from pyflowkern.ops.field import ACTIVATIONS
from pyflowkern.ops.field_layer import activate_layer


def inputs(shape, bias, gate, tangents, dtype=torch.float64, channels_last=False):
    return list(sample(shape, bias, gate, tangents, dtype, channels_last).tensors.values())


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_tangents_are_forward_mode_through_plain_pytorch(backend, activation):
    act = {
        "tanh": torch.tanh,
        "softplus": lambda a: torch.nn.functional.softplus(a, threshold=1e9),
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
    }[activation]
    p, bias, gate = inputs((2, 3, 4, 5), (2, 3), (3,), 2)

    def layer(v):
        return act(gate[:, None, None] * v + bias[..., None, None])

    value, first = torch.func.jvp(layer, (p[:2],), (p[2:4],))
    _, second = torch.func.jvp(layer, (p[:2],), (p[4:],))
    found = field_layer(p, bias, gate, tangents=2, activation=activation)
    torch.testing.assert_close(found, torch.cat([value, first, second]), rtol=1e-12, atol=1e-13)


def test_derivatives_of_softplus_far_below_zero(backend):
    """What is kept is f(a) alone: f' and f'' keep their relative accuracy where it is tiny."""
    a = torch.tensor([-80.0, -30.0, -12.0, -9.0, 0.0, 9.0, 30.0, 80.0]).double()
    for dtype in (torch.float32, torch.float64):
        p, found = torch.stack([a, torch.ones_like(a)]), []
        for f, cast in ((field_layer, dtype), (field_layer_reference, torch.float64)):
            leaf, zero = p.to(cast).requires_grad_(), p.new_zeros(8, dtype=cast)
            out = f(leaf, zero, tangents=1, activation="softplus")
            found.append(torch.autograd.grad(out.sum(), leaf)[0].double())
        torch.testing.assert_close(*found, rtol=32 * torch.finfo(dtype).eps, atol=0)


# --- memory --------------------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
def test_layout_is_that_of_the_product(backend, channels_last):
    p, bias, _ = inputs((2, 4, 3, 5), (4,), None, 1, channels_last=channels_last)
    strides = p.stride()
    p = p.requires_grad_()
    found = field_layer(p, bias, tangents=1)
    (grad,) = torch.autograd.grad(found.sum(), p)
    if _library.kernel_serves("field_layer", p):
        assert found.stride() == grad.stride() == strides
    other = field_layer(p[..., ::2], bias, tangents=1)  # neither: made contiguous
    torch.testing.assert_close(other, found[..., ::2])


def test_memory_of_a_product_of_ones_own():
    for channels_last, activation in itertools.product((False, True), ("tanh", "silu")):
        p, bias, _ = inputs((3, 4, 5, 5), (4,), None, 1, channels_last=channels_last)
        with torch.no_grad():
            assert activate_layer(p, bias, None, 1, activation, in_place=True) is p
        product = p.requires_grad_() * 1
        found = activate_layer(product, bias, None, 1, activation, in_place=True)
        assert (found.data_ptr() == product.data_ptr()) == (activation == "tanh")
        grad = torch.ones_like(found)
        (of_product,) = torch.autograd.grad(found, product, grad)
        assert of_product.data_ptr() == grad.data_ptr()


@pytest.mark.parametrize(
    ("activation", "gate", "kept"),
    [("tanh", None, "h"), ("softplus", None, "h"), ("silu", None, "p"), ("tanh", (4,), "p")],
)
def test_what_is_kept_for_the_backward_pass(activation, gate, kept):
    """The product or the output, never both; the parameters are there anyway."""
    leaves = [None if t is None else t.requires_grad_() for t in inputs((3, 4, 5), (4,), gate, 1)]
    seen = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: seen.append(t) or t, lambda t: t):
        found = field_layer(*leaves, tangents=1, activation=activation)
    large = [t for t in seen if t.shape == leaves[0].shape]
    assert len(large) == 1
    assert torch.equal(large[0], found if kept == "h" else leaves[0])


# --- laws ----------------------------------------------------------------------------------------


# --- wrong arguments -----------------------------------------------------------------------------


def test_wrong_arguments():
    p, bias, gate = inputs((2, 3, 4, 5), (3,), (2, 3), 1)
    for error, message, call in (
        (TypeError, "p must be", lambda: field_layer([1.0], bias)),
        (TypeError, "p must be", lambda: field_layer(p.int(), bias)),
        (ValueError, "p must have a batch axis", lambda: field_layer(p[:, 0, 0, 0], bias)),
        (TypeError, "bias must be", lambda: field_layer(p, None)),
        (ValueError, "bias must have shape", lambda: field_layer(p, bias[:2])),
        (ValueError, "gate must have shape", lambda: field_layer(p, bias, gate)),
        (ValueError, "gate must have shape", lambda: field_layer(p, bias, p[:, :, :3])),
        (ValueError, "tangents", lambda: field_layer(p, bias, tangents=-1)),
        (ValueError, "tangents", lambda: field_layer(p, bias, tangents=True)),
        (ValueError, "stack", lambda: field_layer(p, bias, tangents=2)),
        (ValueError, "activation", lambda: field_layer(p, bias, activation="relu")),
    ):
        with pytest.raises(error, match=message):
            call()
