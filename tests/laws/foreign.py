"""Steps as the models of other libraries have them: weights in other orders, contexts that are joined or activated."""

from dataclasses import replace

import torch

from laws.draws import normal
from pyflowkern.ops import ChainLayer, ChainNetwork, ElementsStep, LUStep, PermuteStep, SplineMap


def shuffled(step, seed=0):
    """The same step, with the rows and columns of every layer in an order of their own."""
    draw = torch.Generator().manual_seed(seed)

    def order(n):
        return torch.randperm(n, generator=draw).tolist()

    layers = [
        replace(layer, columns=order(layer.inputs), rows=order(layer.outputs))
        for layer in step.network.layers
    ]
    return replace(step, network=replace(step.network, layers=layers))


def made(
    features, hidden, per, transform, *, residual=False, context="none", order=None, **options
):
    """nflows' MADE: the degrees of hidden units go round, and feature i has degree i + 1."""
    most, least = max(1, features - 1), min(1, features - 1)
    degrees = torch.arange(hidden) % most + least
    order = list(range(features)) if order is None else order
    units = torch.argsort(degrees, stable=True)
    low = degrees[units].tolist()
    hidden_prefixes = [sum(d <= e for d in low) for e in low]
    deep = {"context": "add", "context_bias": True} if residual and context != "none" else {}
    layers = [ChainLayer(hidden, features, prefixes=low, columns=order, rows=units.tolist())]
    for i in range(2):
        own = deep if i == 0 else {}
        form = {"prefixes": hidden_prefixes, "columns": units.tolist(), "rows": units.tolist()}
        layers.append(ChainLayer(hidden, hidden, **form, **own))
    last = [sum(d <= j for d in low) for j in range(features) for _ in range(per)]
    # scale before shift, as nflows has them
    parts = list(range(per))[:: -1 if transform != "spline" else 1]
    rows = [m * per + k for m in order for k in parts]
    layers.append(ChainLayer(per * features, hidden, True, last, units.tolist(), rows))
    net = ChainNetwork(
        layers, residual=residual, activate_last=not residual, context=context, **options
    )
    element = SplineMap(bins=(per + 1) // 3) if transform == "spline" else transform
    return ElementsStep(element, order, order, net)


def glu_coupling(features, hidden, context="joined", **options):
    """nflows' ResidualNet: the context is read as the last inputs, and gates each block; scales before shifts."""
    reads, moves = list(range(0, features, 2)), list(range(1, features, 2))
    gate = {"context": "gate"}
    layers = [ChainLayer(hidden, len(reads))]
    for _ in range(2):
        layers += [ChainLayer(hidden, hidden), ChainLayer(hidden, hidden, **gate)]
    m = len(moves)
    layers.append(ChainLayer(2 * m, hidden, rows=[*range(m, 2 * m), *range(m)]))
    net = ChainNetwork(layers, residual=True, activate_last=False, context=context, **options)
    return ElementsStep("sigmoid", moves, reads, net, "blocked")


def foreign_flows():
    """Flows of other libraries: (features, steps)."""
    for context in ("none", "activated"):
        steps = [
            made(5, 21, 2, "softplus", context=context, activation="tanh"),
            PermuteStep([4, 2, 0, 1, 3]),
        ]
        yield 5, [*steps, made(5, 21, 2, "softplus", residual=True, context=context)]
    yield 4, [made(4, 13, 8, "spline", context="joined", order=[2, 0, 3, 1]), LUStep(1e-3)]
    yield 5, [glu_coupling(5, 20, activation="elu"), LUStep(1e-3), glu_coupling(5, 20)]
    yield (
        3,
        [LUStep(0.0), shuffled(glu_coupling(3, 17, "activated", activation="silu")), LUStep(0.1)],
    )
    yield 1, [made(1, 5, 2, "exp", context="joined"), LUStep()]


def few_foreign_flows():
    """The same, small enough for second derivatives."""
    yield 3, [made(3, 4, 2, "exp", context="activated", activation="tanh"), LUStep(0.1)]
    yield 3, [made(3, 4, 2, "tanh", residual=True, context="joined", activation="tanh")]
    yield 3, [shuffled(glu_coupling(3, 4, activation="softplus"))]


def agree(found, expected, inputs, dtype):
    """Compare results and the gradients of everything."""
    tight = (
        {"rtol": 1e-9, "atol": 1e-9} if dtype == torch.float64 else {"rtol": 2e-4, "atol": 2e-4}
    )
    torch.testing.assert_close(found, expected, **tight)
    grads = [
        torch.autograd.grad((z.sin() * _weights(z)).sum() + (log * _weights(log)).sum(), inputs)
        for z, log in (found, expected)
    ]
    for a, b in zip(*grads, strict=True):
        scale = b.abs().max().clamp(min=1.0) if b.numel() else 1.0
        torch.testing.assert_close(a / scale, b / scale, **tight)
    return grads[0]


def _weights(t):
    return normal(*t.shape, seed=11, dtype=t.dtype)
