"""MADEs of other libraries with a context: sampling from their weights and masks."""

import pytest
import torch
from laws import normal, randomize

from pyflowkern.ops import MaskedLayer, MaskedPlan, ScaleMap, autoregressive_inverse

D, HIDDEN, K, N = 5, 24, 3, 7

#: Both libraries return the raw scale first.
SCALES = {
    "nflows": ScaleMap("softplus", eps=1e-3),
    "normflows": ScaleMap("sigmoid", offset=2.0, eps=1e-3),
}


def build(name, blocks):
    """Return the library's layer, with changed parameters, and its MADE."""
    torch.manual_seed(0)
    if name == "nflows":
        from nflows.transforms import MaskedAffineAutoregressiveTransform as Layer
    else:
        from normflows.flows import MaskedAffineAutoregressive as Layer
    layer = randomize(Layer(D, HIDDEN, context_features=K, num_blocks=blocks), 1.0).double()
    return layer, layer.autoregressive_net


def plan_of(made, gates):
    layers = [MaskedLayer(made.initial_layer.mask)]
    for block in made.blocks:
        first, second = (linear.mask for linear in block.linear_layers)
        layers.append(MaskedLayer(first, activation="relu"))
        at = len(layers) - 2
        layers.append(MaskedLayer(second, activation="relu", residual=at, gated=gates))
    return MaskedPlan([*layers, MaskedLayer(shift_first(made.final_layer.mask))], D)


def shift_first(t):
    """Exchange the two numbers of each feature."""
    return t.view(D, 2, *t.shape[1:]).flip(1).reshape(t.shape)


def weights_of(name, made, context):
    """Return weights, biases and gates: nflows adds the context, normflows gates each block by it."""
    first, last = made.initial_layer, made.final_layer
    weights, gates = [first.weight], []
    seen = made.context_layer(context)
    biases = [first.bias + (seen.relu() if name == "nflows" else seen)]
    for block in made.blocks:
        seen = block.context_layer(context)
        inner, outer = block.linear_layers
        weights += [inner.weight, outer.weight]
        biases += [inner.bias + seen if name == "nflows" else inner.bias, outer.bias]
        gates += [] if name == "nflows" else [seen.sigmoid()]
    weights.append(shift_first(last.weight))
    biases.append(shift_first(last.bias))
    return weights, biases, gates


@pytest.mark.parametrize("name", SCALES)
@pytest.mark.parametrize("blocks", [1, 2])
def test_samples_and_gradients_agree(name, blocks):
    layer, made = build(name, blocks)
    z, context = normal(N, D, seed=1), normal(N, K, seed=2)
    plan = plan_of(made, gates=name == "normflows")
    found = {}
    for who in ("theirs", "ours"):
        if who == "theirs":
            x, log_det = layer.inverse(z, context=context)
        else:
            weights, biases, gates = weights_of(name, made, context)
            x, log_det = autoregressive_inverse(
                z, weights, biases, plan, transform=SCALES[name], gates=gates
            )
        loss = (x**3).sum() + log_det.square().sum()
        found[who] = (x, log_det, *torch.autograd.grad(loss, list(made.parameters())))
    torch.testing.assert_close(found["ours"], found["theirs"], atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("name", SCALES)
def test_networks_agree(name):
    _, made = build(name, 2)
    x, context = normal(N, D), normal(N, K, seed=1)
    theirs = made(x, context).view(N, D, 2).flip(2)
    plan = plan_of(made, gates=name == "normflows")
    torch.testing.assert_close(plan.parameters(x, *weights_of(name, made, context)), theirs)
