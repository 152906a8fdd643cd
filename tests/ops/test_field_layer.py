"""Layers after a product: against forward mode through plain PyTorch, autograd and float64."""

import itertools

import pytest
import torch
from laws import normal

from pyflowkern import _library, ops
from pyflowkern.core.codes import FieldActivation
from pyflowkern.ops import field_layer, field_layer_reference
from pyflowkern.ops.field import ACTIVATIONS
from pyflowkern.ops.field_layer import activate_layer

#: [N, C, *space] with tails of every kind; planes and channels beyond a block of sums.
SHAPES = [(5, 3), (3, 17, 1, 1), (3, 5, 7), (2, 32, 8, 8), (2, 3, 4, 5), (1, 2, 3, 2, 4)]
LARGE = [(70, 1030), (2, 3, 40, 41), (2, 70, 9, 12), (129, 2, 3)]


def kinds(shape):
    """Shapes of a parameter: of channels or maps, of all samples or of each."""
    n, c, *space = shape
    return (c,), (n, c), (1, c, *space), (n, c, *space)


def inputs(shape, bias, gate, tangents, dtype=torch.float64, channels_last=False):
    p = normal((1 + tangents) * shape[0], *shape[1:], dtype=dtype)
    if channels_last:
        p = p.contiguous(memory_format=torch.channels_last)
    b = normal(*bias, seed=1, dtype=dtype)
    return p, b, None if gate is None else normal(*gate, seed=2, dtype=dtype).sigmoid()


def run(function, p, bias, gate, **options):
    """The result, and the gradients of everything for a fixed gradient of it."""
    leaves = [None if t is None else t.detach().clone().requires_grad_() for t in (p, bias, gate)]
    found = function(*leaves, **options)
    grad = normal(*found.shape, seed=7).to(found.dtype)
    return [
        t.detach()
        for t in (found, *torch.autograd.grad(found, [t for t in leaves if t is not None], grad))
    ]


def check(p, bias, gate, **options):
    """The law of errors: at most twice plain PyTorch's, and 64 roundings of the largest entry."""
    ours, plain = (run(f, p, bias, gate, **options) for f in (field_layer, field_layer_reference))
    wide = [None if t is None else t.double() for t in (p, bias, gate)]
    for a, b, c in zip(ours, plain, run(field_layer_reference, *wide, **options), strict=True):
        assert (a.shape, a.dtype) == (b.shape, b.dtype)
        if a.numel() == 0:
            continue
        floor = 64 * torch.finfo(a.dtype).eps * float(c.abs().max())
        assert (a.double() - c).abs().max() <= 2 * (b.double() - c).abs().max() + floor


# --- values and gradients ------------------------------------------------------------------------


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_every_shape_and_kind_of_parameter(backend, dtype, channels_last):
    for i, shape in enumerate(SHAPES + LARGE):
        if channels_last and len(shape) != 4:
            continue
        gates = (None, *kinds(shape))
        for j, (bias, gate) in enumerate(itertools.product(kinds(shape), gates)):
            tangents = (i + j) % 3
            check(
                *inputs(shape, bias, gate, tangents, dtype, channels_last),
                tangents=tangents,
                activation=ACTIVATIONS[(i + j // 3) % 4],
            )


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, activation):
    for dtype, gate in itertools.product(
        (torch.float32, torch.float64), (None, (6,), (3, 6, 5, 4))
    ):
        for channels_last, tangents in itertools.product((False, True), (0, 1, 4)):
            given = inputs((3, 6, 5, 4), (6,), gate, tangents, dtype, channels_last)
            check(*given, tangents=tangents, activation=activation)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_second_derivatives(backend, activation):
    for gate, tangents in itertools.product((None, (1, 2, 2, 1)), (0, 2)):
        leaves = [t for t in inputs((2, 2, 2, 1), (2, 2), gate, tangents) if t is not None]
        for t in leaves:
            t.requires_grad_()

        def layer(*given, tangents=tangents):
            return field_layer(*given, tangents=tangents, activation=activation)

        torch.autograd.gradcheck(layer, leaves)
        torch.autograd.gradgradcheck(layer, leaves)


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


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_in_place_of_a_product_of_ones_own(backend, activation):
    """Forward where nothing is recorded or the output is kept, backward always: the same numbers."""
    for channels_last, (gate, maps) in itertools.product(
        (False, True), (((3, 4), False), (None, False), (None, True))
    ):
        bias = (1, 4, 5, 5) if maps else (4,)
        given = inputs((3, 4, 5, 5), bias, gate, 2, channels_last=channels_last)
        options = {"tangents": 2, "activation": activation}
        expected = run(field_layer, *given, **options)

        def own(p, bias, gate, *, tangents, activation):
            p = p.clone(memory_format=torch.preserve_format)  # of a leaf, which stays what it is
            return activate_layer(p, bias, gate, tangents, activation, in_place=True)

        for a, b in zip(run(own, *given, **options), expected, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-13, atol=1e-14)
        with torch.no_grad():
            torch.testing.assert_close(own(*given, **options), expected[0], rtol=1e-13, atol=1e-14)
        if not maps:
            leaves = [t.requires_grad_() for t in given if t is not None]

            def layer(p, bias, gate=None, *, options=options, own=own):
                return own(p, bias, gate, **options)

            torch.autograd.gradgradcheck(layer, leaves, fast_mode=True)


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


def test_a_bad_sample_stays_alone(backend):
    for channels_last in (False, True):
        p, bias, gate = inputs((5, 3, 4, 5), (3,), (5, 3), 1, channels_last=channels_last)
        good = run(field_layer, p, bias, gate, tangents=1)
        p[2, 1, 3, 2] = torch.nan
        bad = run(field_layer, p, bias, gate, tangents=1)
        others = torch.tensor([0, 1, 3, 4, 5, 6, 8, 9])
        for a, b in zip(good[:2], bad[:2], strict=True):
            assert torch.equal(a[others], b[others])
            assert b[2].isnan().any()
        assert torch.equal(good[3][[0, 1, 3, 4]], bad[3][[0, 1, 3, 4]])


def test_threads_do_not_matter():
    for channels_last in (False, True):
        given = inputs((40, 16, 12, 12), (16,), (16,), 1, torch.float32, channels_last)
        first = run(field_layer, *given, tangents=1)
        torch.set_num_threads(2)
        for a, b in zip(first, run(field_layer, *given, tangents=1), strict=True):
            assert torch.equal(a, b)
        torch.set_num_threads(1)


def test_no_samples(backend):
    for shape in ((0, 3), (0, 3, 4, 4), (2, 3, 0)):
        for bias, gate in itertools.product(((3,), shape), (None, (3,))):
            check(*inputs(shape, bias, gate, 1), tangents=1)


def test_opcheck(backend):
    for channels_last, maps in itertools.product((False, True), (False, True)):
        shape = (2, 3, 4, 5)
        bias, gate = ((1, 3, 4, 5), shape) if maps else ((3,), (2, 3))
        given = [
            t.requires_grad_() for t in inputs(shape, bias, gate, 1, channels_last=channels_last)
        ]
        op = torch.ops.pyflowkern.field_layer.default
        silu, tanh = FieldActivation.SILU.value, FieldActivation.TANH.value
        torch.library.opcheck(op, (*given, 1, silu))
        torch.library.opcheck(op, (*given[:2], None, 1, tanh))
        p, *parameters = (t.detach() for t in given)
        torch.library.opcheck(torch.ops.pyflowkern.field_layer_.default, (p, *parameters, 1, silu))
        backward = torch.ops.pyflowkern.field_layer_backward_.default
        torch.library.opcheck(backward, (p.clone(), p, *parameters, 1, silu))


def test_compiles():
    given = [t.requires_grad_() for t in inputs((2, 3, 4, 5), (3,), (2, 3), 1)]

    def loss(*given):
        without = field_layer(*given[:2], tangents=1, activation="softplus")
        return field_layer(*given, tangents=1).square().sum() + without.square().sum()

    expected = torch.autograd.grad(loss(*given), given)
    found = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(*given), given
    )
    torch.testing.assert_close(found, expected)


def test_function_transforms_take_the_reference():
    p, bias, _ = inputs((4, 3, 5), (3,), None, 0)
    _, tangent = torch.func.jvp(lambda v: field_layer(v, bias), (p,), (p,))
    torch.testing.assert_close(tangent, field_layer(torch.cat([p, p]), bias, tangents=1)[4:])
    each = torch.func.vmap(lambda v: field_layer(v[None], bias)[0])(p)
    torch.testing.assert_close(each, field_layer(p, bias))


def test_autocast_changes_nothing(backend):
    given = inputs((2, 3, 4, 5), (3,), (3,), 1, torch.float32)
    expected = run(field_layer, *given, tangents=1)
    with torch.autocast(given[0].device.type, dtype=torch.bfloat16):
        found = run(field_layer, *given, tangents=1)
    for a, b in zip(found, expected, strict=True):
        assert torch.equal(a, b)


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


def test_kernels_serve():
    names = [f"field_layer{end}" for end in ("", "_", "_backward", "_backward_")]
    assert all(name in _library.OPS for name in names)
    assert ops.field_layer is field_layer
