"""What tests of ``memory="reversible"`` share: twins of modules that store, and comparisons of their gradients."""

import copy
from functools import partial

import torch

from pyflowkern import nn

#: Of float64, several layers there and back.
ROUNDING = 1e-10


def twin(module):
    """Return a copy that keeps no activations."""
    other = copy.deepcopy(module)
    for part in other.modules():
        if isinstance(part, nn.Sequential):
            part.memory = "reversible"
    return other


def results(call, module, *inputs):
    """Return what a call gives, and the gradients of its inputs and of all parameters."""
    inputs = [
        t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
        for t in inputs
    ]
    torch.manual_seed(0)
    y, log_det = call(*inputs)
    wanted = [t for t in (*inputs, *module.parameters()) if t is not None and t.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad((y**3).sum() + (log_det**2).sum(), wanted, **options)
    return [y.detach(), log_det.detach(), *grads, torch.rand(1)]


def same(found, wanted, tolerance=ROUNDING):
    for a, b in zip(found, wanted, strict=True):
        largest = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def couplings(count=4, memory="reversible"):
    """Return couplings that no op replaces: of images."""
    layers = []
    for i in range(count):
        torch.manual_seed(i)
        layers.append(nn.AffineCoupling(4, partial(nn.ConvNet, hidden=4), swap=i % 2 == 1))
        for p in layers[-1].parameters():
            torch.nn.init.normal_(p, std=0.3)
    return nn.Sequential(*layers, memory=memory).double()


IMAGES = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()
