"""Plans of masked networks: where they are made, and what is no plan."""

import pytest
import torch

from pyflowkern import nn
from pyflowkern.ops import MaskedLayer, MaskedPlan


@pytest.mark.parametrize("default", ["meta", "float64"])
def test_plans_are_made_on_the_host(default):
    layers = [MaskedLayer(torch.ones(3, 3).tril(-1))]
    before = torch.get_default_dtype()
    try:
        if default == "float64":
            torch.set_default_dtype(torch.float64)
        with torch.device("meta" if default == "meta" else "cpu"):
            plan = MaskedPlan(layers, 3)
            network = nn.MaskedMLP(3, 2, random_degrees=True)
    finally:
        torch.set_default_dtype(before)
    assert plan.counts.device.type == network.plan.table.device.type == "cpu"
    assert plan.level.tolist() == [0, 1, 2]


@pytest.mark.parametrize(
    ("layers", "features", "words"),
    [
        ([], 2, "at least one layer"),
        ([MaskedLayer(torch.ones(2, 2))], 2, r"not autoregressive: features \[0, 1\]"),
        ([MaskedLayer(torch.eye(2))], 2, "depend on themselves"),
        ([MaskedLayer(torch.zeros(3, 2))], 2, "not a multiple of 2"),
        ([MaskedLayer(torch.zeros(2, 3))], 2, "reads 3 values, its source has 2"),
        ([MaskedLayer(torch.zeros(2, 2), activation="relu")], 2, "without an activation"),
        ([MaskedLayer(torch.zeros(2, 2), source=1)], 2, "earlier layers"),
        ([MaskedLayer(torch.zeros(2, 2), residual=0)], 2, "earlier layers"),
        (
            [MaskedLayer(torch.zeros(4, 2)), MaskedLayer(torch.zeros(2, 4), residual=0)],
            2,
            "differ in width",
        ),
        (
            [
                MaskedLayer(torch.zeros(2, 2)),
                MaskedLayer(torch.zeros(2, 2), source=0, activation="relu"),
                MaskedLayer(torch.zeros(2, 2), source=0, activation="tanh"),
            ],
            2,
            "several activations",
        ),
    ],
)
def test_bad_plans(layers, features, words):
    with pytest.raises(ValueError, match=words):
        MaskedPlan(layers, features)


def test_bad_layers():
    with pytest.raises(ValueError, match="activation must be one of"):
        MaskedLayer(torch.zeros(2, 2), activation="cosine")
    with pytest.raises(ValueError, match="must be a matrix"):
        MaskedLayer(torch.zeros(2))
    with pytest.raises(TypeError, match=r"mask must be a torch\.Tensor, got list"):
        MaskedLayer([[0, 0]])
    with pytest.raises(TypeError, match=r"layers\[0\] must be a MaskedLayer, got Tensor"):
        MaskedPlan([torch.zeros(2, 2)], 2)
    with pytest.raises(TypeError, match="features must be an int, got float"):
        MaskedPlan([MaskedLayer(torch.zeros(2, 2))], 2.0)
