"""relu_network: values and derivatives of linear layers and ReLUs, sample by sample, at every SIMD level."""

import pytest
import torch
from cases.relu_network import FORMS, sample
from laws import check_batched_gradients, hold, normal
from torch.utils._pytree import tree_leaves

from pyflowkern.ops import relu_network, relu_network_reference


def test_more_samples_than_a_wave_of_the_backward_pass(backend):
    hold(relu_network, relu_network_reference, sample("residual", 20_000, torch.float32), floor=32)


class Exported(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.last = torch.nn.Linear(3, 127), torch.nn.Linear(127, 2)

    def forward(self, x):
        layers = self.first, self.last
        return relu_network(x, [y.weight for y in layers], [y.bias for y in layers])


def test_a_graph_exported_without_gradients_still_has_them():
    module, x = Exported(), normal(200, 3, dtype=torch.float32, seed=1).requires_grad_()
    with torch.no_grad():
        exported = torch.export.export(module, (x,)).module()
    (found,) = torch.autograd.grad(exported(x).sum(), x)
    (want,) = torch.autograd.grad(module(x).sum(), x)
    torch.testing.assert_close(found, want)


@pytest.mark.parametrize(
    ("change", "error", "text"),
    [
        (lambda a: a.__setitem__("x", a["x"][0]), ValueError, r"x must have shape \[N, in\]"),
        (
            lambda a: a["weights"].__setitem__(1, a["weights"][1].t()),
            ValueError,
            r"weights\[1\] must have shape",
        ),
        (
            lambda a: a["biases"].__setitem__(2, a["biases"][2].float()),
            TypeError,
            r"biases\[2\] must have the",
        ),
        (
            lambda a: a.__setitem__("context", a["context"].float()),
            TypeError,
            "context must have the dtype",
        ),
    ],
)
def test_wrong_arguments_are_named(change, error, text):
    args = sample("plain", 5)
    change(args.tensors)
    with pytest.raises(error, match=text):
        relu_network(**args.tensors)


def test_wrong_forms_are_named():
    args = sample("plain", 5).tensors
    with pytest.raises(ValueError, match="pairs of layers"):
        relu_network(**args, residual=True)
    with pytest.raises(ValueError, match="activate_last=False"):
        relu_network(**args, activate_last=False)


@pytest.mark.parametrize("form", FORMS)
def test_batched_gradients_are_those_one_by_one(backend, form):
    args = sample(form, 3)
    leaves = [t.requires_grad_() for t in tree_leaves(args.tensors) if t is not None]
    check_batched_gradients(relu_network(**args.tensors, **args.fixed), leaves)
