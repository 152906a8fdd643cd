"""autoregressive_inverse: every network and transform against a pass a feature in float64, and its gradients."""

import copy
import pickle

import pytest
import torch
from cases.autoregressive import gated, made
from laws import Sample, hold, normal

from pyflowkern.ops import (
    MaskedLayer,
    MaskedPlan,
    autoregressive_inverse,
    autoregressive_inverse_reference,
    scale_map,
)
from pyflowkern.ops.elements import apply_elements


def to(dtype, *groups):
    return [[t.to(dtype) for t in group] for group in groups]


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


def test_agrees_with_passes_at_the_size_of_miniboone():
    plan, w, b = made(43, (512, 512), 2)
    w, b, (z,) = to(torch.float32, w, b, [normal(100, 43)])
    x, log_det = autoregressive_inverse(z, w, b, plan)
    expected = autoregressive_inverse_reference(z, w, b, plan)
    torch.testing.assert_close(x, expected[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(log_det, expected[1], atol=1e-4, rtol=1e-5)


def hold_plan(plan, z, weights, biases):
    sample = Sample({"z": z, "weights": weights, "biases": biases}, plan=plan)
    hold(autoregressive_inverse, autoregressive_inverse_reference, sample, floor=16)


def test_network_of_a_coupling_has_two_levels(backend):
    """Any masks that leave an order: here half of the features depends on all of the other half."""
    mask = torch.zeros(6, 6, dtype=torch.bool)
    mask[[1, 3, 5], 0] = mask[[1, 3, 5], 4] = True
    plan = MaskedPlan([MaskedLayer(mask.repeat_interleave(2, 0))], features=6)
    assert plan.levels == 2
    hold_plan(plan, normal(33, 6, seed=2), [normal(12, 6)], [normal(12, seed=1)])


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
    z = normal(5, 3, seed=4)
    hold_plan(plan, z, weights, biases)
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


def test_masked_weights_are_not_read(backend):
    plan, w, b = made(4, (8, 8), 2)
    z = normal(3, 4)
    bad = [torch.where(s.mask, v, torch.nan) for s, v in zip(plan.layers, w, strict=True)]
    torch.testing.assert_close(
        autoregressive_inverse(z, bad, b, plan), autoregressive_inverse(z, w, b, plan)
    )


def test_a_changed_weight_is_seen():
    """Packed weights are kept between calls; ``.data`` changes no version, and must be seen all the same."""
    plan, w, b = made(4, (8,), 2)
    z = normal(3, 4)
    autoregressive_inverse(z, w, b, plan)
    w[0].data.mul_(2)
    torch.testing.assert_close(
        autoregressive_inverse(z, w, b, plan), autoregressive_inverse_reference(z, w, b, plan)
    )


def test_biases_of_other_layers_are_seen():
    """A bias that is missing, or of every sample, is not taken for that of another layer."""
    mask = torch.ones(4, 4, dtype=torch.bool)
    first = torch.tensor([True, False]).expand(4, 2)
    plan = MaskedPlan(
        [MaskedLayer(first), MaskedLayer(mask & torch.tensor([[0], [0], [1], [1]]).bool())], 2
    )
    weights, bias = [normal(4, 2), normal(4, 4, seed=1)], normal(4, seed=2)
    z, own = normal(3, 2, seed=3), normal(3, 4, seed=4)
    for biases in ([bias, None], [None, bias], [bias, own], [own, bias]):
        torch.testing.assert_close(
            autoregressive_inverse(z, weights, biases, plan),
            autoregressive_inverse_reference(z, weights, biases, plan),
        )


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
        ({"transform": "cosine"}, ValueError, "transform must be"),
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
