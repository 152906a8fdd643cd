"""Convolutional fields: against reverse-mode products, whole Jacobians and FFJORD's layers."""

import pytest
import torch
from laws import check_batched_gradients, check_gradients, normal
from torch.nn import functional as F

from pyflowkern import nn, ops
from pyflowkern.nn import _stacked

TIMES = ("none", "concat", "concatsquash")


def make(time="concatsquash", hidden=(5, 4), activation="tanh", context=0, dtype=torch.float64):
    torch.manual_seed(0)
    field = nn.VectorFieldConv(2, hidden, activation, time, context_features=context)
    return field.to(dtype)


def states(n=3, seed=0, dtype=torch.float64):
    return normal(n, 2, 4, 3, seed=seed, dtype=dtype)


def naive(field, t, x, e, context=None):
    """FFJORD's estimate ``(e^T J) e``: one VJP, differentiable."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = field(t, x, context)
    (product,) = torch.autograd.grad(y, x, e, create_graph=True)
    return y, (product * e).flatten(1).sum(1)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu", "gelu"])
def test_equals_the_naive_form_for_the_same_probe(time, activation):
    """(e^T J) e is e^T (J e): to 1e-12 in float64 and 1e-5 in float32, of sums of order one."""
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        field = make(time, activation=activation, dtype=dtype)
        x, e = states(dtype=dtype), states(seed=1, dtype=dtype)
        for t in (0.3, torch.tensor(0.3), normal(3, seed=4, dtype=dtype)):
            found = field.velocity_and_divergence(t, x, probe=e)
            for a, b in zip(found, naive(field, t, x, e), strict=True):
                assert (a - b).abs().max() <= rtol * b.abs().max()


@pytest.mark.parametrize("time", TIMES)
def test_exact_is_the_trace_of_the_jacobian(time):
    field, x = make(time), states()
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: field(0.4, v[None])[0]))(x)
    matrix = jacobian.reshape(3, 24, 24)
    y, divergence, kinetic, frobenius = field.velocity_and_divergence(
        0.4, x, method="exact", regularizers=True
    )
    trace = matrix.diagonal(dim1=1, dim2=2).sum(1)
    torch.testing.assert_close(divergence, trace, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(frobenius, matrix.square().sum((1, 2)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(kinetic, y.square().sum((1, 2, 3)), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(y, field(0.4, x), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("most", [1, 700, 1500])
def test_exact_in_chunks(time, most, monkeypatch):
    """One tangent at a time, or several with a remainder: same values and first and second derivatives."""
    field, found = make(time, context=3), []
    for size in (_stacked.MOST, most):
        monkeypatch.setattr(_stacked, "MOST", size)
        x, c = states().requires_grad_(), normal(3, 3, seed=2).requires_grad_()
        outputs = field.velocity_and_divergence(
            0.4, x, context=c, method="exact", regularizers=True
        )
        wanted = [x, c, *field.parameters()]
        loss = sum(v.square().sum() for v in outputs)
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        again = torch.autograd.grad(sum(g.square().sum() for g in first), wanted)
        with torch.no_grad():
            plain = field.velocity_and_divergence(0.4, x, context=c, method="exact")
        found.append([*outputs, *first, *again, *plain])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


def test_exact_takes_bounded_memory():
    """4 samples of 16 channels and 768 dimensions: all tangents at once would have 2^29.6 numbers."""
    seen = []
    field, x = nn.VectorFieldConv(3, (16,)), torch.randn(4, 3, 32, 32)
    hooks = [field._run]
    field._run = lambda t, x, e, c: seen.append(e.shape[0]) or hooks[0](t, x, e, c)
    field.velocity_and_divergence(0.0, x, method="exact")
    assert sum(seen) == 3072
    assert (1 + max(seen)) * 4 * 16 * 1024 <= _stacked.MOST


def test_probes_are_seeds_or_tensors_and_average():
    field, x = make(), states()
    e = ops.rademacher(torch.tensor(5), (4, 3, 24), torch.float64).view(4, *x.shape)
    for probe in (torch.tensor(5), e):
        each = field.velocity_and_divergence(
            0.1, x, probe=probe, probes=4, per_probe=True, regularizers=True
        )
        expected = torch.stack([naive(field, 0.1, x, v)[1] for v in e])
        torch.testing.assert_close(each[1], expected, rtol=1e-12, atol=1e-12)
        products = [torch.func.jvp(lambda v: field(0.1, v), (x,), (v,))[1] for v in e]
        norm = torch.stack([p.square().sum((1, 2, 3)) for p in products]).mean(0)
        torch.testing.assert_close(each[3], norm, rtol=1e-12, atol=1e-12)
        mean = field.velocity_and_divergence(0.1, x, probe=probe, probes=4)[1]
        torch.testing.assert_close(mean, expected.mean(0), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("time", TIMES)
@pytest.mark.parametrize("activation", ["tanh", "softplus", "silu", "gelu"])
def test_gradients_are_those_of_the_naive_form(time, activation):
    """First and second derivatives in the parameters, the state, the time and the context."""
    field, e = make(time, activation=activation, context=3), states(seed=1)
    found = []
    for form in ("fused", "naive"):
        x, c = states().requires_grad_(), normal(3, 3, seed=2).requires_grad_()
        t = torch.tensor(0.4).double().requires_grad_()
        if form == "fused":
            y, divergence = field.velocity_and_divergence(t, x, probe=e, context=c)
        else:
            y, divergence = naive(field, t, x, e, c)
        wanted = [x, c, *field.parameters(), *([] if time == "none" else [t])]
        loss = y.square().sum() + divergence.square().sum()
        first = torch.autograd.grad(loss, wanted, create_graph=True)
        again = torch.autograd.grad(
            sum(g.square().sum() for g in first), wanted, allow_unused=True
        )
        found.append([*first, *again])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-10)
    torch.testing.assert_close(a, b)
    check_gradients(
        field,
        sum(map(torch.sum, field.velocity_and_divergence(0.4, states(), probe=e, context=c))),
    )


def test_batched_gradients_are_those_one_by_one():
    for time, activation in (("none", "tanh"), ("concatsquash", "silu")):
        field, x = make(time, activation=activation), states().requires_grad_()
        _, divergence = field.velocity_and_divergence(0.4, x, probe=states(seed=1))
        check_batched_gradients(divergence, [x, *field.parameters()])


def test_vmap_in_single_precision():
    field, x = make("concatsquash").float(), states().float()
    # with the axis of vmap the input of the convolution has five axes
    several = torch.stack([x, 2 * x])
    found = torch.func.vmap(lambda v: field(0.4, v))(several)
    torch.testing.assert_close(found, torch.stack([field(0.4, v) for v in several]))


def test_concat_is_a_channel_of_time():
    """The time is the first channel, and is padded with zeros like the others."""
    field, x, t = make("concat", hidden=()), states(), 0.7
    weight = torch.cat([field.times[0], field.layers[0].weight], 1)
    h = torch.cat([torch.full_like(x[:, :1], t), x], 1)
    expected = F.conv2d(h, weight, field.layers[0].bias, padding=1)
    torch.testing.assert_close(field(t, x), expected)


def test_concatsquash_is_the_layer_of_ffjord():
    """FFJORD's layer: (W * x + b) sigmoid(gate(t)) + hyper_bias(t), one number a channel."""
    field, x, t = make("concatsquash", hidden=()), states(), 0.7
    u, c, v = (p[:, None, None] for p in field.times[0])
    expected = field.layers[0](x) * torch.sigmoid(u * t + c) + v * t
    torch.testing.assert_close(field(t, x), expected)


def test_context_is_a_bias_of_each_sample():
    field, x, c = make("none", hidden=(), context=3), states(), normal(3, 3, seed=1)
    expected = field.layers[0](x) + (c @ field.contexts[0].t())[..., None, None]
    torch.testing.assert_close(field(0.0, x, c), expected)


def test_a_bad_sample_stays_alone():
    field, x, e = make(), states(), states(seed=1)
    good = field.velocity_and_divergence(0.2, x, probe=e)
    x[1, 0, 2, 1] = torch.nan
    found = field.velocity_and_divergence(0.2, x, probe=e)
    for a, b in zip(found, good, strict=True):
        torch.testing.assert_close(a[::2], b[::2])
        assert a[1].isnan().any()


def test_half_states_are_computed_in_float32():
    field, x = make("concat", context=2, dtype=torch.float32), states(dtype=torch.bfloat16)
    options = {"probe": ops.draw_probe(x, seed=1), "context": normal(3, 2, dtype=torch.float32)}
    y, divergence = field.velocity_and_divergence(0.1, x, **options)
    assert (y.dtype, divergence.dtype) == (torch.bfloat16, torch.float32)
    whole = field.velocity_and_divergence(0.1, x.float(), **options)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = field.velocity_and_divergence(0.1, x.float(), **options)
    for a, b in zip(under, whole, strict=True):
        assert torch.equal(a, b)
    torch.testing.assert_close(divergence, whole[1])


@pytest.mark.parametrize(
    "options",
    [
        {"padding": 1, "padding_mode": "circular"},
        {"padding": 2, "dilation": 2},
        {"padding": 1, "groups": 2},
        {"padding": "same"},
    ],
    ids=str,
)
def test_another_convolution_in_a_layers_place_is_called(options):
    field = nn.VectorFieldConv(2, (4,), "tanh").double()
    field.layers[0] = torch.nn.Conv2d(2, 4, 3, **options).double()
    x, e = normal(3, 2, 5, 4), normal(3, 2, 5, 4, seed=1)
    net = lambda x: field.layers[1](field.layers[0](x).tanh())  # noqa: E731
    velocity, divergence = field.velocity_and_divergence(0.5, x, probe=e)
    torch.testing.assert_close(velocity, net(x))
    _, product = torch.func.jvp(net, (x,), (e,))
    torch.testing.assert_close(divergence, (product * e).flatten(1).sum(1))


def test_compiles():
    field, e = make(dtype=torch.float32), states(seed=1, dtype=torch.float32)
    x = states(dtype=torch.float32).requires_grad_()

    def loss(x):
        y, divergence = field.velocity_and_divergence(0.2, x, probe=e)
        return y.square().sum() + divergence.sum()

    (expected,) = torch.autograd.grad(loss(x), x)
    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(torch.autograd.grad(compiled(x), x)[0], expected)


def test_no_samples():
    field, x = make(), states(0)
    y, divergence = field.velocity_and_divergence(0.0, x, probe=ops.draw_probe(x, seed=0))
    assert (y.shape, divergence.shape) == (x.shape, (0,))


def test_wrong_arguments():
    field, x = nn.VectorFieldConv(2), torch.zeros(3, 2, 4, 4)
    told = nn.VectorFieldConv(2, (3,), context_features=2)
    probe = ops.draw_probe(x)
    for error, message, call in (
        (ValueError, "channels and hidden", lambda: nn.VectorFieldConv(0)),
        (ValueError, "activation", lambda: nn.VectorFieldConv(2, activation="relu")),
        (ValueError, "time", lambda: nn.VectorFieldConv(2, time="fourier")),
        (TypeError, "context_features", lambda: nn.VectorFieldConv(2, context_features=1.5)),
        (ValueError, r"x must have shape \[N, 2, H, W\]", lambda: field(0.0, x[:, :1])),
        (ValueError, r"x must have shape \[N, 2, H, W\]", lambda: field(0.0, x[..., 0])),
        (ValueError, "t must be", lambda: field(x[0, 0, 0], x)),
        (ValueError, "needs a probe", lambda: field.velocity_and_divergence(0.0, x)),
        (
            ValueError,
            "no probe",
            lambda: field.velocity_and_divergence(0.0, x, probe=probe, method="exact"),
        ),
        (
            ValueError,
            "method must",
            lambda: field.velocity_and_divergence(0.0, x, probe=probe, method="xtrace"),
        ),
        (
            ValueError,
            "probe must have shape",
            lambda: field.velocity_and_divergence(0.0, x, probe=x[:2]),
        ),
        (ValueError, "context must be None", lambda: field(0.0, x, x[:, 0, 0])),
        (ValueError, r"context must have shape \(3, 2\)", lambda: told(0.0, x)),
        (TypeError, "context must be a torch.Tensor", lambda: told(0.0, x, [[1.0, 2.0]])),
    ):
        with pytest.raises(error, match=message):
            call()
