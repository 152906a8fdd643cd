"""Fields with their divergence: against naive VJPs, enumeration, autograd and float64."""

import itertools

import pytest
import torch
from fields import check, layers, run
from laws import normal

from pyflowkern import _library, ops
from pyflowkern.core.codes import FieldActivation, FieldFlag
from pyflowkern.ops import (
    draw_probe,
    field_divergence,
    field_divergence_reference,
    hutchinson_trace,
    rademacher,
)
from pyflowkern.ops.field import (
    ACTIVATIONS,
    activation_and_slope,
    evaluate_field,
    evaluate_velocity,
)

SHAPES = [(7,), (64, 60, 5), (200, 130)]  # narrow, several layers, sums beyond the caches


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


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation_and_size(backend, activation, dtype):
    for hidden, (gates, n) in itertools.product(SHAPES, ((False, None), (True, None), (True, 37))):
        x, parts = normal(37, 5, dtype=dtype), layers((5, *hidden, 5), dtype, n, gates)
        e = normal(2, 37, 5, seed=3, dtype=dtype)
        check(x, parts, probe=e, activation=activation, regularizers=True)


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


@pytest.mark.parametrize("n", [0, 1, 3, 24, 25, 129, 1000])
def test_awkward_batches(backend, n):
    for d, hidden in ((1, (3,)), (2, (64, 64, 64)), (43, (150,))):
        x, e = normal(n, d), normal(n, d, seed=1)
        check(x, layers((d, *hidden, d)), probe=e)


def test_states_without_features(backend):
    x, parts = normal(3, 0), layers((0, 4, 0))
    for probe in (normal(3, 0), torch.tensor(1)):
        velocity, divergence = field_divergence(x, *parts, probe=probe)
        assert velocity.shape == (3, 0)
        assert divergence.tolist() == [0, 0, 0]


def test_layers_beyond_the_caches(backend):
    for activation, gates in (("tanh", False), ("silu", True)):
        parts = layers((3, 1030, 40, 30, 3), gates=gates)
        check(normal(7, 3), parts, probe=torch.tensor(4), probes=2, activation=activation)
        e = normal(7, 3, seed=2)
        check(normal(7, 3), parts, probe=e, activation=activation, regularizers=True)


def test_closed_gates(backend):
    """A gate of zero lets nothing through and still has a gradient, that of any other gate."""
    for hidden, method in itertools.product(SHAPES, ("hutchinson", "exact")):
        weights, biases, gates = layers((5, *hidden, 5), gates=True)
        for gate in gates:
            gate[::3] = 0
        probe = {"probe": normal(37, 5, seed=3)} if method == "hutchinson" else {}
        check(normal(37, 5), (weights, biases, gates), method=method, **probe)


def test_no_hidden_layer(backend):
    parts = layers((4, 4), gates=True)
    check(normal(5, 4), parts, probe=torch.tensor(3), probes=2)
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


@pytest.mark.parametrize("activation", ACTIVATIONS)
@pytest.mark.parametrize("hidden", [(7,), (200,), (64, 60), (200, 130)], ids=str)
def test_exact_trace_in_closed_form(backend, hidden, activation):
    for dtype, gates in itertools.product((torch.float32, torch.float64), (False, True)):
        x, parts = normal(37, 5, dtype=dtype), layers((5, *hidden, 5), dtype, None, gates)
        check(x, parts, method="exact", activation=activation)
    own = layers((5, *hidden, 5), gates=True, n=37)
    check(normal(37, 5), own, method="exact", activation=activation)
    own[2][-1] = own[2][-1][0]  # one output gate for all: the closed form again
    check(normal(37, 5), own, method="exact", activation=activation)


@pytest.mark.parametrize(
    ("n", "hidden", "method"),
    [(7, (600, 65), "exact"), (9000, (9, 33), "exact"), (3, (1100, 40), "hutchinson")],
    ids=["sums of more terms than a panel", "of more than are packed at once", "beyond the cache"],
)
def test_products_larger_than_what_is_multiplied_at_a_time(backend, n, hidden, method):
    dims = (5, *hidden, 5)
    options = {"method": method} | ({} if method == "exact" else {"probe": torch.tensor(3)})
    for dtype in (torch.float32, torch.float64):
        check(normal(n, 5, dtype=dtype), layers(dims, dtype), **options)


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


def test_second_derivatives(backend):
    for activation, gates in itertools.product(ACTIVATIONS, (False, True)):
        for method in ("hutchinson", "exact"):
            x, parts = normal(3, 2), layers((2, 4, 3, 2), gates=gates)
            flat = [t.requires_grad_() for t in (x, *parts[0], *parts[1], *parts[2])]
            probe = {"probe": normal(3, 2, seed=4)} if method == "hutchinson" else {}

            def field(x, *p, activation=activation, method=method, probe=probe):
                options = {"activation": activation, "method": method, **probe}
                return field_divergence(x, p[:3], p[3:6], p[6:] or None, **options)

            torch.autograd.gradcheck(field, flat)
            torch.autograd.gradgradcheck(field, flat)


def test_gradients_of_one_output_alone(backend):
    for hidden, method in itertools.product(SHAPES, ("hutchinson", "exact")):
        x, parts = normal(6, 5).requires_grad_(), layers((5, *hidden, 5))
        options = {"method": method} | ({} if method == "exact" else {"probe": normal(6, 5)})
        for i, create in itertools.product((0, 1), (False, True)):
            found = field_divergence(x, *parts, **options)[i].sum()
            expected = field_divergence_reference(x, *parts, **options)[i].sum()
            for a, b in zip(
                torch.autograd.grad(found, x, create_graph=create),
                torch.autograd.grad(expected, x),
                strict=True,
            ):
                torch.testing.assert_close(a, b)


def test_a_bad_sample_stays_alone(backend):
    for hidden, method in itertools.product(SHAPES, ("hutchinson", "exact")):
        options = {"method": method} | ({} if method == "exact" else {"probe": torch.tensor(1)})
        parts, x = layers((5, *hidden, 5)), normal(50, 5)
        good = field_divergence(x, *parts, **options)
        others = torch.arange(50) != 30
        for poison in (torch.nan, torch.inf):
            bad = x.clone()
            bad[30, 2] = poison
            found = field_divergence(bad, *parts, **options)
            for a, b in zip(found, good, strict=True):
                assert torch.equal(a[others], b[others])
            assert found[0][30].isnan().any() or poison == torch.inf
            leaf = bad.requires_grad_()
            outputs = field_divergence(leaf, *parts, **options)
            (grad,) = torch.autograd.grad([t.sum() for t in outputs], leaf)
            assert grad[others].isfinite().all()


def test_bad_gates_of_a_sample_stay_alone(backend):
    """Of layers with other strides, too, whose padding they could fill."""
    for hidden in SHAPES:
        weights, biases, gates = layers((2, *hidden, 2), n=40, gates=True)
        x, e = normal(40, 2), normal(40, 2, seed=3)
        good = field_divergence(x, weights, biases, gates, probe=e, regularizers=True)
        for poison in (torch.nan, torch.inf):
            for part in (biases, gates):
                part[0][0] = poison
            found = field_divergence(x, weights, biases, gates, probe=e, regularizers=True)
            for a, b in zip(found, good, strict=True):
                assert torch.equal(a[1:], b[1:])
                assert not a[0].isfinite().all()


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


def test_threads_do_not_matter():
    """In cache; the wide fields' products are torch's."""
    x, parts = normal(700, 6, dtype=torch.float32), layers((6, 60, 60, 6), torch.float32)
    first = run(field_divergence, x, parts, probe=torch.tensor(2))
    torch.set_num_threads(2)
    for a, b in zip(first, run(field_divergence, x, parts, probe=torch.tensor(2)), strict=True):
        assert torch.equal(a, b)


def test_many_samples_in_waves(backend):
    """More than 64 tasks of 512 samples: sums go on in double."""
    x, parts = normal(40_000, 2, dtype=torch.float32), layers((2, 8, 2), torch.float32)
    check(x, parts, probe=torch.tensor(2))


def test_opcheck(backend):
    x, probe = normal(5, 3).requires_grad_(), normal(2, 5, 3)
    for hidden, gates in (((4, 4), True), ((4,), False), ((140,), False)):
        w, b, g = ([t.requires_grad_() for t in p] for p in layers((3, *hidden, 3), gates=gates))
        keep, cached, norm = FieldFlag.KEEP.value, FieldFlag.IN_CACHE.value, FieldFlag.NORM.value
        every = (keep, keep + cached, keep + cached + norm)
        for flags in every if max(hidden) <= 128 else (keep, keep + norm):
            torch.library.opcheck(
                torch.ops.pyflowkern.field_divergence.default,
                (x, probe, 2, w, b, g, FieldActivation.TANH.value, flags),
            )
        for flags in every[:2]:
            torch.library.opcheck(
                torch.ops.pyflowkern.field_exact.default,
                (x, w, b, g, FieldActivation.TANH.value, flags),
            )
    torch.library.opcheck(
        torch.ops.pyflowkern.hutchinson_trace.default, (x, normal(5, 3, seed=1).requires_grad_())
    )


def test_compiles():
    x, parts = normal(5, 3).requires_grad_(), layers((3, 8, 8, 3))

    def loss(x, seed):
        y, divergence = field_divergence(x, *parts, probe=seed)
        return (
            y.square().sum()
            + divergence.sum()
            + field_divergence(x, *parts, method="exact")[1].sum()
        )

    seed = torch.tensor(3)
    expected = torch.autograd.grad(loss(x, seed), x)
    found = torch.autograd.grad(
        torch.compile(loss, fullgraph=True, backend="aot_eager")(x, seed), x
    )
    torch.testing.assert_close(found, expected)


def test_forward_mode_and_vmap_take_the_reference():
    x, parts = normal(5, 3), layers((3, 8, 3))
    e = normal(5, 3, seed=1)
    _, tangent = torch.func.jvp(lambda v: field_divergence(v, *parts, probe=e)[1], (x,), (e,))
    step = 1e-6
    high, low = (field_divergence(x + s * e, *parts, probe=e)[1] for s in (step, -step))
    torch.testing.assert_close(tangent, (high - low) / (2 * step), rtol=1e-6, atol=1e-8)


def test_autocast_changes_nothing(backend):
    for hidden in SHAPES:
        x, parts = normal(5, 3, dtype=torch.float32), layers((3, *hidden, 3), torch.float32)
        for options in ({"probe": torch.tensor(1)}, {"method": "exact"}):
            expected = field_divergence(x, *parts, **options)
            with torch.autocast(x.device.type, dtype=torch.bfloat16):
                found = field_divergence(x, *parts, **options)
            for a, b in zip(found, expected, strict=True):
                assert torch.equal(a, b)


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
        (TypeError, "x must be", lambda: field_divergence([1.0], w, b, probe=e)),
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
        (TypeError, r"weights\[0\]", lambda: field_divergence(x, [[1.0]], b[:1], probe=e)),
        (TypeError, r"biases\[1\]", lambda: field_divergence(x, w, [b[0], b[1].int()], probe=e)),
        (ValueError, r"weights\[1\]", lambda: field_divergence(x, [w[0], w[0]], b, probe=e)),
        (ValueError, r"biases\[0\]", lambda: field_divergence(x, w, b[::-1], probe=e)),
        (ValueError, "je must have", lambda: hutchinson_trace(e, e[:2])),
        (TypeError, "e must be", lambda: hutchinson_trace(e.int(), e)),
        (ValueError, "kind", lambda: draw_probe(x, kind="uniform")),
        (ValueError, "seed is for", lambda: draw_probe(x, kind="gaussian", seed=1)),
    ):
        with pytest.raises(error, match=message):
            call()


def test_kernels_serve():
    names = ("field_divergence", "field_exact", "hutchinson_trace")
    assert all(op in _library.OPS and f"{op}_backward" in _library.OPS for op in names)
    assert ops.field_divergence is field_divergence
