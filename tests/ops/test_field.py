"""Fields with their divergence: against naive VJPs, enumeration, autograd and float64."""

import itertools

import pytest
import torch
from cases.field import SHAPES, layers, sample
from laws import Sample, hold, normal

from pyflowkern.core.activations import activation_and_slope
from pyflowkern.ops import (
    draw_probe,
    field_divergence,
    field_divergence_reference,
    rademacher,
)
from pyflowkern.ops.field import (
    ACTIVATIONS,
    evaluate_field,
    evaluate_velocity,
)


def mlp(x, parts, activation):
    """The field alone, as everybody writes it."""
    act = {
        "tanh": torch.tanh,
        "softplus": lambda a: torch.nn.functional.softplus(a, threshold=1e9),
        "silu": torch.nn.functional.silu,
        "gelu": torch.nn.functional.gelu,
    }[activation]
    weights, biases, gates = parts
    for i, (w, b) in enumerate(zip(weights, biases, strict=True)):
        x = x @ w.t()
        x = (gates[i] * x if gates else x) + b
        x = act(x) if i < len(weights) - 1 else x
    return x


def naive(x, parts, e, activation="tanh"):
    """FFJORD's estimate: one VJP, differentiable."""
    x = x if x.requires_grad else x.detach().requires_grad_()
    y = mlp(x, parts, activation)
    (ej,) = torch.autograd.grad(y, x, e, create_graph=True)
    return y, (ej * e).sum(1)


# --- values and gradients ------------------------------------------------------------------------


def test_velocity_alone(backend):
    """What comes without a tangent is what comes with one; so are its first and second derivatives."""
    for hidden, (gates, n) in itertools.product(SHAPES, ((False, None), (True, None), (True, 37))):
        x, parts = normal(37, 5), layers((5, *hidden, 5), n=n, gates=gates)
        leaves = [t.requires_grad_() for t in (x, *parts[0], *parts[1], *parts[2])]
        found = evaluate_velocity(x, parts, "tanh")
        expected = mlp(x, parts, "tanh")
        torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
        g = normal(37, 5, seed=5).requires_grad_()
        first = [torch.autograd.grad(y, leaves, g, create_graph=True) for y in (found, expected)]
        for a, b in zip(*first, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        second = [torch.autograd.grad(f[0].square().sum(), (x, g, parts[0][0])) for f in first]
        for a, b in zip(*second, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
        plain = evaluate_velocity(x.detach(), parts, "tanh")
        assert torch.equal(plain, found.detach()) or x.is_cuda


def test_closed_gates(backend):
    """A gate of zero lets nothing through and still has a gradient, that of any other gate."""
    for hidden, method in itertools.product(SHAPES, ("hutchinson", "exact")):
        weights, biases, gates = layers((5, *hidden, 5), gates=True)
        for gate in gates:
            gate[::3] = 0
        probe = {"probe": normal(37, 5, seed=3)} if method == "hutchinson" else {}
        tensors = {"x": normal(37, 5), "weights": weights, "biases": biases, "gates": gates}
        hold(
            field_divergence,
            field_divergence_reference,
            Sample(tensors, method=method, **probe),
            16,
        )


def test_no_hidden_layer(backend):
    parts = layers((4, 4), gates=True)
    _, divergence = field_divergence(normal(5, 4), *parts, method="exact")
    torch.testing.assert_close(divergence, (parts[2][0] * parts[0][0].diag()).sum().expand(5))


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(64, 64, 64), (60, 33), (300, 200)], ids=str)
def test_equals_the_naive_form_for_the_same_probe(backend, hidden, activation):
    """(e^T J) e is e^T (J e): to 1e-12 in float64 and 1e-5 in float32, of sums of order one."""
    for dtype, rtol in ((torch.float64, 1e-12), (torch.float32, 1e-5)):
        x, parts = normal(50, 6, dtype=dtype), layers((6, *hidden, 6), dtype)
        e = normal(50, 6, seed=2, dtype=dtype)
        y, divergence = field_divergence(x, *parts, probe=e, activation=activation)
        velocity, estimate = naive(x, parts, e, activation)
        for a, b in ((y, velocity), (divergence, estimate)):
            assert (a - b).abs().max() <= rtol * b.abs().max()


def test_mean_over_all_signs_is_the_trace(backend):
    """Enumeration of the sign vectors gives the trace, to rounding."""
    for hidden in SHAPES:
        x, parts = normal(9, 5), layers((5, *hidden, 5))
        signs = torch.tensor(list(itertools.product((-1.0, 1.0), repeat=5))).double()
        probes = signs[:, None].expand(-1, 9, -1)
        _, mean = field_divergence(x, *parts, probe=probes)
        _, exact = field_divergence(x, *parts, method="exact")
        jacobians = torch.func.vmap(torch.func.jacrev(lambda v, p=parts: mlp(v, p, "tanh")))(x)
        trace = jacobians.diagonal(dim1=1, dim2=2).sum(1)
        torch.testing.assert_close(mean, trace, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(exact, trace, rtol=1e-12, atol=1e-12)
        *_, frobenius = field_divergence(x, *parts, method="exact", regularizers=True)
        expected = jacobians.square().sum((1, 2))
        torch.testing.assert_close(frobenius, expected, rtol=1e-12, atol=1e-12)


# --- probes --------------------------------------------------------------------------------------


def test_signs_from_a_seed_are_those_of_the_reference(backend):
    for hidden in SHAPES:
        for n, d, k in ((1, 3, 1), (50, 5, 3)):
            x, parts = normal(n, d), layers((d, *hidden, d))
            seed = draw_probe(x, seed=11)
            e = rademacher(seed, (k, n, d), torch.float64)
            found = field_divergence(x, *parts, probe=seed, probes=k, per_probe=True)
            torch.testing.assert_close(found, field_divergence(x, *parts, probe=e, per_probe=True))


def test_signs_are_fair():
    signs = rademacher(torch.tensor(5), (100_000,))
    assert set(signs.tolist()) == {-1.0, 1.0}
    assert abs(signs.mean()) < 4 / 100_000**0.5  # four standard deviations


@pytest.mark.parametrize("kind", ["rademacher", "gaussian"])
def test_variance_of_the_estimate(kind):
    """The variance is 2 (|S|^2 - sum S_ii^2) for signs, 2 |S|^2 for Gaussian probes, S the symmetric part."""
    matrix, k = normal(4, 4), 200_000
    sym = (matrix + matrix.t()) / 2
    expected = 2 * (
        sym.square().sum() - (sym.diagonal().square().sum() if kind == "rademacher" else 0)
    )
    x = normal(1, 4)
    probe = draw_probe(x, probes=k, kind=kind, generator=torch.Generator().manual_seed(0))
    _, found = field_divergence(
        x, [matrix], [torch.zeros(4).double()], probe=probe, probes=k, per_probe=True
    )
    torch.testing.assert_close(found.mean(), matrix.trace(), rtol=0, atol=0.05)
    torch.testing.assert_close(found.var(), expected, rtol=0.03, atol=0)  # 1 / sqrt(k) = 0.002


def test_probe_that_wants_a_gradient(backend):
    x, parts = normal(4, 3), layers((3, 8, 3))
    e = normal(4, 3, seed=5).requires_grad_()
    _, divergence = field_divergence(x, *parts, probe=e)
    (grad,) = torch.autograd.grad(divergence.sum(), e)
    (expected,) = torch.autograd.grad(naive(x, parts, e)[1].sum(), e)
    torch.testing.assert_close(grad, expected)


# --- laws ----------------------------------------------------------------------------------------


def test_layers_that_do_not_fit_are_an_error(backend):
    """Of callers that check nothing, such as a module whose layers were replaced."""
    x = normal(3, 2)
    for part, i, bad in (
        (0, 1, normal(7, 9)),
        (0, 1, normal(9, 7)),
        (1, 0, normal(6)),
        (0, 1, normal(2, 7, dtype=torch.float32)),
    ):
        parts = layers((2, 7, 2))
        parts[part][i] = bad
        for call in (
            lambda parts=parts: evaluate_velocity(x, parts, "tanh"),
            lambda parts=parts: evaluate_field(x, normal(1, 3, 2), 1, parts, "tanh", "hutchinson"),
            lambda parts=parts: evaluate_field(x, x, 1, parts, "tanh", "exact"),
        ):
            with pytest.raises(RuntimeError):
                call()


def test_many_samples_in_waves(backend):
    """More than 64 tasks of 512 samples: sums go on in double."""
    many = sample(40_000, (8,), torch.float32, 2, probe=torch.tensor(2))
    hold(field_divergence, field_divergence_reference, many, 16)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_activations_far_out(backend, activation):
    """Saturated and huge arguments: finite, and the limits of the functions."""
    a = torch.tensor([-1e4, -100.0, -30.0, -9.0, 0.0, 9.0, 30.0, 100.0, 1e4]).double()
    for dtype in (torch.float32, torch.float64):
        x = a.to(dtype)[:, None]
        one, zero = torch.ones(1, 1, dtype=dtype), torch.zeros(1, dtype=dtype)
        y, slope = field_divergence(
            x, [one, one], [zero, zero], activation=activation, probe=torch.ones_like(x)
        )
        value, expected = activation_and_slope(a, activation)
        eps = 8 * torch.finfo(dtype).eps
        torch.testing.assert_close(y[:, 0].double(), value, rtol=eps, atol=eps)
        torch.testing.assert_close(slope.double(), expected, rtol=eps, atol=eps)


# --- wrong arguments -----------------------------------------------------------------------------


def test_wrong_arguments():
    x, parts = normal(4, 3), layers((3, 8, 3))
    w, b, _ = parts
    e = normal(4, 3)
    for error, message, call in (
        (ValueError, "x must have shape", lambda: field_divergence(x[0], w, b, probe=e)),
        (ValueError, "activation", lambda: field_divergence(x, w, b, probe=e, activation="relu")),
        (ValueError, "method", lambda: field_divergence(x, w, b, probe=e, method="xtrace")),
        (ValueError, "needs a probe", lambda: field_divergence(x, w, b)),
        (ValueError, "no probe", lambda: field_divergence(x, w, b, probe=e, method="exact")),
        (ValueError, "probe must have", lambda: field_divergence(x, w, b, probe=e[:2])),
        (TypeError, "probe must be", lambda: field_divergence(x, w, b, probe=e.int())),
        (ValueError, "no axes", lambda: field_divergence(x, w, b, probe=e.long())),
        (ValueError, "probes", lambda: field_divergence(x, w, b, probe=torch.tensor(1), probes=0)),
        (ValueError, "one entry a layer", lambda: field_divergence(x, w, b[:1], probe=e)),
        (ValueError, r"weights\[1\]", lambda: field_divergence(x, [w[0], w[0]], b, probe=e)),
        (ValueError, "kind", lambda: draw_probe(x, kind="uniform")),
        (ValueError, "seed is for", lambda: draw_probe(x, kind="gaussian", seed=1)),
    ):
        with pytest.raises(error, match=message):
            call()
