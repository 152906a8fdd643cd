"""autoregressive_inverse: every network and transform against a pass a feature in float64, and its gradients."""

import copy
import dataclasses
import itertools
import pickle

import pytest
import torch
from laws import jacobian_log_det, normal

from pyflowkern.ops import (
    MaskedLayer,
    MaskedPlan,
    ScaleMap,
    SplineMap,
    autoregressive_inverse,
    autoregressive_inverse_reference,
    scale_map,
)
from pyflowkern.ops._elements import apply_elements, element_code, element_map, element_parameters
from pyflowkern.ops.masked_plan import ACTIVATIONS

MAPS = [
    "affine",
    "exp",
    "tanh",
    "atan",
    "sigmoid",
    "softplus",
    "additive",
    ScaleMap("sigmoid", offset=2.0, shift_first=True),
    ScaleMap("softplus", eps=1e-3, divide=True),
    SplineMap(bins=8),
    SplineMap(bins=5, tails="circular", scale=0.5),
    SplineMap(bins=4, tails="affine", parameterization="softclip"),
    SplineMap(bins=4, tails="affine", parameterization="domain"),
    SplineMap("linear", bins=6),
    SplineMap("quadratic", bins=4),
    SplineMap("cubic", bins=5),
]


def made(features, hidden, outputs, *, order=None, activation="relu", residual=0, seed=0, n=0):
    """Return a plan, weights and biases of order one; the first bias ``[n, units]`` if there is ``n``."""
    rank = torch.argsort(torch.tensor(order or range(features)))
    degrees = [1 + torch.randperm(h) % max(1, features - 1) for h in hidden]
    masks = [degrees[0][:, None] > rank]
    layers = [MaskedLayer(masks[0])]
    for low, high in itertools.pairwise(degrees):
        layers.append(MaskedLayer(high[:, None] >= low, activation=activation))
    for _ in range(residual):
        square, at = degrees[-1][:, None] >= degrees[-1], len(layers) - 1
        layers.append(MaskedLayer(square, activation=activation))
        layers.append(MaskedLayer(square, activation=activation, residual=at))
    last = (rank[:, None] >= degrees[-1]).repeat_interleave(outputs, 0)
    layers.append(MaskedLayer(last, activation=activation))
    weights = [
        normal(*s.mask.shape, seed=seed + i) / s.mask.shape[1] ** 0.5 for i, s in enumerate(layers)
    ]
    biases = [normal(s.mask.shape[0], seed=seed + 50 + i) / 4 for i, s in enumerate(layers)]
    if n:
        biases[0] = normal(n, hidden[0], seed=seed + 99)
    return MaskedPlan(layers, features), weights, biases


def to(dtype, *groups):
    return [[t.to(dtype) for t in group] for group in groups]


def gated(plan, n=0, seed=70):
    """Return the plan with gates on the second layer of each residual block and on the last, and gates in (0, 1)."""
    last = len(plan.layers) - 1
    layers = [
        dataclasses.replace(s, gated=s.residual is not None or i == last)
        for i, s in enumerate(plan.layers)
    ]
    gates = [
        normal(*([n] if n else []), s.mask.shape[0], seed=seed + i).sigmoid()
        for i, s in enumerate(layers)
        if s.gated
    ]
    return MaskedPlan(layers, plan.features), gates


def check(plan, weights, biases, z, transform="affine", dtype=torch.float32, gates=()):
    """Values and gradients: at most twice plain PyTorch's error at this dtype, and some roundings of the largest.

    These are 16, more than other ops are allowed: a unit is a sum of as many terms as there are units before it.  In
    float64 they are 256, since what both are held against is not exact there: every feature's rounding goes
    through all later ones, whose slopes are up to ten.
    """
    results = []
    for function, kind in (
        (autoregressive_inverse, dtype),
        (autoregressive_inverse_reference, dtype),
        (autoregressive_inverse_reference, torch.float64),
    ):
        given = (z, *weights, *biases, *gates)
        leaves = [t.detach().to(dtype).to(kind).requires_grad_() for t in given]
        w, b = leaves[1 : 1 + len(weights)], leaves[1 + len(weights) :]
        b, g = b[: len(biases)], b[len(biases) :]
        x, log_det = function(leaves[0], w, b, plan, transform=transform, gates=g)
        assert x.dtype == kind
        loss = (x.double() * normal(*x.shape, seed=7)).sum()
        loss = loss + (log_det.double() * normal(len(x), seed=8)).sum()
        grads = torch.autograd.grad(loss, leaves, allow_unused=True, materialize_grads=True)
        results.append([t.detach().double() for t in (x, log_det, *grads)])
    for i, (ours, plain, exact) in enumerate(zip(*results, strict=True)):
        assert ours.shape == exact.shape
        if exact.numel() == 0:
            continue
        scale = max(float(exact.abs().max()), plan.features**0.5 if i == 1 else 0.0)
        roundings = 256 if dtype == torch.float64 else 16
        allowed = 2 * (plain - exact).abs().max() + roundings * torch.finfo(dtype).eps * scale
        worst = (ours - exact).abs().max()
        assert worst <= allowed, f"result {i}: error {worst:.3g}, allowed {allowed:.3g}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("transform", MAPS, ids=str)
def test_every_transform(backend, transform, dtype):
    plan, w, b = made(5, (13, 9), element_parameters(element_map(transform)))
    check(plan, w, b, normal(7, 5, seed=3), transform, dtype)


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_every_activation(backend, activation):
    plan, w, b = made(6, (17, 17), 2, activation=activation, residual=1)
    for dtype in (torch.float32, torch.float64):
        check(plan, w, b, normal(5, 6, seed=3), dtype=dtype)


@pytest.mark.parametrize("samples", [0, 1, 3, 16, 65, 300])
@pytest.mark.parametrize("residual", [0, 2])
def test_awkward_sizes(backend, samples, residual):
    for features, hidden in ((1, (3,)), (2, (5, 1)), (7, (70, 33)), (19, (8, 150))):
        order = list(range(features))[::-1]
        plan, w, b = made(features, hidden, 2, order=order, residual=residual, n=samples)
        check(plan, w, b, normal(samples, features, seed=3))


@pytest.mark.parametrize("samples", [0, 1, 65, 300])
@pytest.mark.parametrize("of", ["each sample", "all samples"])
def test_gates(backend, samples, of):
    for features, hidden, transform in ((1, (3,), "affine"), (7, (70, 33), "softplus")):
        plan, w, b = made(features, hidden, 2, residual=2, n=samples)
        plan, gates = gated(plan, samples if of == "each sample" else 0)
        for dtype in (torch.float32, torch.float64):
            check(plan, w, b, normal(samples, features, seed=3), transform, dtype, gates)


@pytest.mark.parametrize("transform", ["additive", SplineMap(bins=3)], ids=str)
def test_gates_of_other_transforms(backend, transform):
    plan, w, b = made(5, (13, 9), element_parameters(element_map(transform)), residual=1)
    plan, gates = gated(plan, 7)
    for dtype in (torch.float32, torch.float64):
        check(plan, w, b, normal(7, 5, seed=3), transform, dtype, gates)


def test_a_gate_multiplies_product_and_bias_and_spares_the_residual(backend):
    plan, w, b = made(4, (9,), 2, residual=1, activation="tanh")
    plan, gates = gated(plan, 3)
    x = normal(3, 4)

    def linear(i, v):
        return v @ (w[i] * plan.layers[i].mask).T + b[i]

    h = linear(0, x)
    h = h + gates[0] * linear(2, linear(1, h.tanh()).tanh())
    theta = gates[1] * linear(3, h.tanh())
    torch.testing.assert_close(plan.parameters(x, w, b, gates).flatten(1), theta)
    z, log_det = apply_elements(x, theta.view(3, 4, 2), scale_map("exp"))
    found = autoregressive_inverse(z, w, b, plan, transform="exp", gates=gates)
    torch.testing.assert_close(found, (x, -log_det))


def test_a_bad_gate_stays_in_its_sample(backend):
    plan, w, b = made(5, (20,), 2, residual=1)
    plan, gates = gated(plan, 4)
    w, b, gates, (z,) = to(torch.float32, w, b, gates, [normal(4, 5)])
    good = autoregressive_inverse(z, w, b, plan, gates=gates)
    gates[0][2] = torch.nan
    found = autoregressive_inverse(z, w, b, plan, gates=gates)
    others = [0, 1, 3]
    for a, c in zip(found, good, strict=True):
        assert torch.equal(a[others], c[others])
    assert found[1][2].isnan()


def test_agrees_with_passes_at_the_size_of_miniboone():
    plan, w, b = made(43, (512, 512), 2)
    w, b, (z,) = to(torch.float32, w, b, [normal(100, 43)])
    x, log_det = autoregressive_inverse(z, w, b, plan)
    expected = autoregressive_inverse_reference(z, w, b, plan)
    torch.testing.assert_close(x, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, expected[1], atol=1e-4, rtol=1e-5)


def test_network_of_a_coupling_has_two_levels(backend):
    """Any masks that leave an order: here half of the features depends on all of the other half."""
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[[1, 3, 5], 0] = mask[[1, 3, 5], 4] = True
    plan = MaskedPlan([MaskedLayer(mask.repeat_interleave(2, 0))], features=6)
    assert plan.levels == 2
    check(plan, [normal(12, 6)], [normal(12, seed=1)], normal(33, 6, seed=2))


def test_sources_and_residuals_of_any_kind(backend):
    """A skip from the input, a linear layer on raw values, and a residual of other degrees."""
    a = torch.tensor([[1, 0, 0], [1, 1, 0], [0, 0, 0], [1, 0, 0]])
    b = torch.tensor([[1, 1, 1, 1], [0, 0, 1, 0], [0, 0, 1, 1], [0, 0, 0, 0]])
    c = torch.tensor([[0] * 4, [0, 0, 0, 1], [1, 1, 1, 1]])
    plan = MaskedPlan(
        [
            MaskedLayer(a),
            MaskedLayer(b, activation="tanh", residual=0),
            MaskedLayer(torch.ones(3, 3).tril(-1).repeat_interleave(2, 0), source=-1),
            MaskedLayer(c.repeat_interleave(2, 0), source=1, residual=2),
        ],
        features=3,
    )
    weights = [normal(*s.mask.shape, seed=i) for i, s in enumerate(plan.layers)]
    biases = [normal(s.mask.shape[0], seed=9) for s in plan.layers]
    check(plan, weights, biases, normal(5, 3, seed=4), dtype=torch.float64)
    z = normal(5, 3)
    torch.testing.assert_close(
        autoregressive_inverse(z, weights, [None] * 4, plan),
        autoregressive_inverse_reference(z, weights, [None] * 4, plan),
    )


def test_undoes_the_density_direction(backend):
    plan, w, b = made(5, (11,), 2)
    z = normal(4, 5)
    x, log_det = autoregressive_inverse(z, w, b, plan, transform="exp")
    again, other = apply_elements(x, plan.parameters(x, w, b), scale_map("exp"))
    torch.testing.assert_close(again, z)
    torch.testing.assert_close(other, -log_det)


def test_log_det_is_that_of_the_jacobian(backend):
    plan, w, b = made(4, (9,), 2, activation="silu")
    z = normal(2, 4)
    _, log_det = autoregressive_inverse(z, w, b, plan)
    expected = jacobian_log_det(lambda v: autoregressive_inverse(v, w, b, plan)[0], z)
    torch.testing.assert_close(log_det, expected)


@pytest.mark.parametrize("with_gates", [False, True])
def test_gradgradcheck(backend, with_gates):
    plan, w, b = made(3, (5,), 2, activation="tanh", residual=1)
    plan, gates = gated(plan, 2) if with_gates else (plan, [])
    leaves = [t.requires_grad_() for t in (normal(2, 3), *w, *b, *gates)]

    def op(z, *rest):
        w, b, gates = rest[:4], rest[4:8], rest[8:]
        return autoregressive_inverse(z, w, b, plan, transform="exp", gates=gates)

    torch.autograd.gradcheck(op, leaves)
    torch.autograd.gradgradcheck(op, leaves)


def test_half_inputs_are_computed_in_float32(backend):
    plan, w, b = made(5, (9,), 2)
    z = normal(3, 5)
    for dtype in (torch.bfloat16, torch.float16):
        w16, b16, (z16,) = to(dtype, w, b, [z])
        x, log_det = autoregressive_inverse(z16, w16, b16, plan)
        assert (x.dtype, log_det.dtype) == (dtype, torch.float32)
        exact, _ = autoregressive_inverse_reference(
            z16.double(), *to(torch.float64, w16, b16), plan
        )
        # one rounding on the way out for the kernels; the reference rounds every layer
        torch.testing.assert_close(x.double(), exact, atol=0.1, rtol=0.1)


def test_bad_sample_stays_alone(backend):
    plan, w, b = made(6, (20, 20), 2)
    w, b, (z,) = to(torch.float32, w, b, [normal(5, 6)])
    good = autoregressive_inverse(z, w, b, plan)
    for poison in (torch.nan, torch.inf):
        bad = z.clone()
        bad[1, 2] = poison
        x, log_det = autoregressive_inverse(bad, w, b, plan)
        others = [0, 2, 3, 4]
        assert torch.equal(x[others], good[0][others])
        assert torch.equal(log_det[others], good[1][others])
        assert torch.equal(x[1, :2], good[0][1, :2])
        assert not torch.isfinite(x[1, 2])


def test_masked_weights_are_not_read(backend):
    plan, w, b = made(4, (8, 8), 2)
    z = normal(3, 4)
    bad = [torch.where(s.mask, v, torch.nan) for s, v in zip(plan.layers, w, strict=True)]
    torch.testing.assert_close(
        autoregressive_inverse(z, bad, b, plan), autoregressive_inverse(z, w, b, plan)
    )


def test_samples_do_not_depend_on_the_batch_or_the_threads():
    plan, w, b = made(9, (30, 30), 2)
    w, b, (z,) = to(torch.float32, w, b, [normal(300, 9)])
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        whole = autoregressive_inverse(z, w, b, plan)
    finally:
        torch.set_num_threads(threads)
    parts = [autoregressive_inverse(p, w, b, plan) for p in z.split([1, 20, 279])]
    for i in range(2):
        assert torch.equal(whole[i], torch.cat([p[i] for p in parts]))


def test_a_changed_weight_is_seen():
    """Packed weights are kept between calls; ``.data`` changes no version, and must be seen all the same."""
    plan, w, b = made(4, (8,), 2)
    z = normal(3, 4)
    autoregressive_inverse(z, w, b, plan)
    w[0].data.mul_(2)
    torch.testing.assert_close(
        autoregressive_inverse(z, w, b, plan), autoregressive_inverse_reference(z, w, b, plan)
    )


def test_opcheck():
    plan, w, b = made(3, (5,), 2, residual=1)
    packed, offsets = plan.pack(w, b)
    for t in (*packed, *offsets):
        t.requires_grad_()
    code = element_code(element_map("exp"))
    args = (normal(2, 3).requires_grad_(), plan.table, plan.table, packed, offsets)
    torch.library.opcheck(
        torch.ops.pyflowkern.autoregressive_inverse.default,
        (*args, plan.structure(), *code),
    )
    packed = [t.detach() for t in packed]
    slopes = [normal(2, 5, seed=i) for i in range(3)]
    torch.library.opcheck(
        torch.ops.pyflowkern.autoregressive_solve.default,
        (
            normal(2, 3),
            normal(2, 3).exp(),
            normal(2, 3, 2),
            plan.table,
            packed,
            slopes,
            plan.structure(),
        ),
    )


@pytest.mark.slow
def test_compiles_whole():
    plan, w, b = made(4, (8,), 2)
    w, b, (z,) = to(torch.float32, w, b, [normal(3, 4)])
    leaves = [t.requires_grad_() for t in (z, *w, *b)]

    def loss(z, w, b):
        x, log_det = autoregressive_inverse(z, w, b, plan)
        return (x**2).sum() + log_det.sum()

    grads = [
        torch.autograd.grad(f(z, w, b), leaves)
        for f in (loss, torch.compile(loss, fullgraph=True))
    ]
    torch.testing.assert_close(grads[0], grads[1])


def test_plans_can_be_copied():
    plan, w, b = made(4, (8,), 2)
    z = normal(3, 4)
    for other in (copy.deepcopy(plan), pickle.loads(pickle.dumps(plan))):
        torch.testing.assert_close(
            autoregressive_inverse(z, w, b, other), autoregressive_inverse(z, w, b, plan)
        )


# --- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"z": torch.zeros(2, 4)}, ValueError, r"z must have shape \[N, 3\]"),
        ({"z": torch.zeros(2, 3, dtype=torch.int64)}, TypeError, "z must be a floating-point"),
        ({"weights": []}, ValueError, "2 layers, got 0 weights"),
        (
            {"weights": [torch.zeros(5, 3), torch.zeros(6, 4)]},
            ValueError,
            r"weights\[1\] must have",
        ),
        ({"biases": [torch.zeros(4), None]}, ValueError, r"biases\[0\] must have shape \(5,\)"),
        (
            {"biases": [torch.zeros(3, 5), None]},
            ValueError,
            r"biases\[0\] must have shape \(2, 5\)",
        ),
        (
            {"transform": "additive"},
            ValueError,
            "returns 2 numbers a feature, the transform takes 1",
        ),
        ({"transform": "cosine"}, ValueError, "scale_map must be"),
        ({"gates": []}, ValueError, "1 gated layers, got 0 gates"),
        ({"gates": [torch.zeros(3, 6)]}, ValueError, r"gates\[0\] must have shape \(2, 6\)"),
        ({"gates": [torch.ones(6, dtype=torch.bool)]}, TypeError, r"gates\[0\] must be a float"),
    ],
)
def test_bad_arguments(change, error, words):
    plan, _, _ = made(3, (5,), 2)
    if "gates" in change:
        plan, _ = gated(plan)
    arguments = {
        "z": torch.zeros(2, 3),
        "weights": [torch.zeros(5, 3), torch.zeros(6, 5)],
        "biases": [None, None],
        "plan": plan,
    }
    with pytest.raises(error, match=words):
        autoregressive_inverse(**(arguments | change))
