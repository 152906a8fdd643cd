"""Networks and matrices as other libraries keep them, against those libraries' formulas in plain PyTorch."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from cases.chain import K, autoregressive, coupling, leaves, sample, with_contexts
from laws import normal
from laws.foreign import agree, shuffled
from torch.nn import functional

from pyflowkern import ops
from pyflowkern.ops import (
    ChainLayer,
    ChainNetwork,
    ChainProgram,
    ElementsStep,
    ScaleMap,
    SplineMap,
)

DTYPES = [torch.float32, torch.float64]


# ---- plain PyTorch ------------------------------------------------------------------------------


def affine(raw_scale, shift, x):
    """z = s x + t as nflows' autoregressive layers have it."""
    scale = functional.softplus(raw_scale) + 1e-3
    return scale * x + shift, scale.log().sum(1)


SOFTPLUS = ScaleMap("softplus", eps=1e-3)


def cyclic(features, hidden):
    """The degrees of units that go round: 1, 2, ..., D - 1, 1, 2, ...; they are not sorted."""
    most = max(1, features - 1)
    return (torch.arange(hidden) % most + min(1, features - 1)).tolist()


def made_masks(degrees, features, per):
    """Masks between layers of these degrees; each feature has `per` outputs, which see what is below it alone."""
    masks = [
        torch.tensor(high)[:, None] >= torch.tensor(low)
        for low, high in itertools.pairwise(degrees)
    ]
    last = torch.arange(1, features + 1).repeat_interleave(per)
    return [*masks, last[:, None] > torch.tensor(degrees[-1])]


def made(x, context, masks, tensors, residual):
    """A MADE whose first layer adds the activated context, with residual or other blocks, of ReLUs."""
    left = iter(tensors)
    linear = lambda h, mask: functional.linear(h, next(left) * mask, next(left))  # noqa: E731
    h = linear(x, masks[0])
    if context is not None:
        seen = functional.linear(context, tensors[-2], tensors[-1])
        h = h + seen.relu()
    if not residual:
        for mask in masks[1:]:
            h = linear(h.relu(), mask)
        return h
    for first, second in zip(masks[1:-1:2], masks[2:-1:2], strict=True):
        inner = linear(h.relu(), first)
        if context is not None:
            inner = inner + functional.linear(context, next(left), next(left))
        h = h + linear(inner.relu(), second)
    return linear(h, masks[-1])


def ranked(degrees):
    """The units in the order of their degrees."""
    return sorted(range(len(degrees)), key=lambda unit: degrees[unit])


def made_step(features, degrees, transform, rows, residual, with_context):
    """The program of such a network, whose weights are read as they lie; `rows`: of the last layer."""
    inputs = [*range(1, features + 1)]
    layers = []
    for i, (low, high) in enumerate(itertools.pairwise([inputs, *degrees])):
        order, low = ranked(high), sorted(low)
        adds = with_context and residual and i % 2 == 1
        layers.append(
            ChainLayer(
                outputs=len(high),
                inputs=len(low),
                prefixes=[sum(d <= high[unit] for d in low) for unit in order],
                columns=ranked(inputs if i == 0 else degrees[i - 1]),
                rows=order,
                context="add" if adds else "none",
                context_bias=adds,
            )
        )
    per = len(rows) // features
    last = [sum(d <= feature for d in degrees[-1]) for feature in range(features)]
    layers.append(
        ChainLayer(
            outputs=len(rows),
            inputs=len(degrees[-1]),
            prefixes=[n for n in last for _ in range(per)],
            columns=ranked(degrees[-1]),
            rows=rows,
        )
    )
    net = ChainNetwork(
        layers,
        "relu",
        residual,
        activate_last=not residual,
        context="activated" if with_context else "none",
    )
    return ElementsStep(transform, range(features), range(features), net)


def by_passes(z, function):
    """The inverse of an autoregressive function: each pass finds one feature more."""
    x = torch.zeros_like(z)
    for _ in range(z.shape[1]):
        raw, shift = function(x)
        scale = functional.softplus(raw) + 1e-3
        x = (z - shift) / scale
    return x, -scale.log().sum(1)


# ---- masked networks ----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("with_context", [False, True])
@pytest.mark.parametrize(("residual", "features"), [(True, 5), (False, 5), (True, 1), (True, 2)])
@pytest.mark.parametrize("inverse", [False, True])
def test_a_made_is_read_as_its_weights_lie(
    backend, residual, features, with_context, inverse, dtype
):
    """Degrees of units go round, and the raw scale of a feature stands before its shift."""
    hidden = [cyclic(features, 13)] * (5 if residual else 3)
    scale_first = [2 * j + k for j in range(features) for k in (1, 0)]
    step = made_step(features, hidden, SOFTPLUS, scale_first, residual, with_context)
    program = ChainProgram(features, [step], K if with_context else 0)
    masks = made_masks([[*range(1, features + 1)], *hidden], features, 2)
    tensors = leaves(program, dtype)
    x = normal(9, features, seed=3, dtype=dtype).requires_grad_()
    context = normal(9, K, seed=4, dtype=dtype).requires_grad_() if with_context else None

    def parameters(x):
        return made(x, context, masks, tensors, residual).view(9, features, 2).unbind(2)

    expected = by_passes(x, parameters) if inverse else affine(*parameters(x), x)
    found = ops.chain(x, program, tensors, context=context, inverse=inverse)
    inputs = [x, *tensors, *([context] if with_context else [])]
    grads = agree(found, expected, inputs, dtype)
    names = [w.name for w in program.tensors]
    of_weights = [i for i, name in enumerate(names) if name.startswith("weight of layers")]
    for mask, i in zip(masks, of_weights, strict=True):
        assert (grads[1 + i][~mask] == 0).all()
    assert all(
        not mask.any() or grads[1 + i].any() for mask, i in zip(masks, of_weights, strict=True)
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
def test_a_network_of_any_order_that_reads_the_context_as_an_input(backend, inverse, dtype):
    """Of features in a random order, units that see subsets of each other, and one block of outputs per parameter."""
    features, hidden, order = 5, (17, 12), [3, 0, 4, 1, 2]
    place = torch.argsort(torch.tensor(order))  # when each feature is found
    drawn = torch.Generator().manual_seed(1)
    # a unit of degree m sees the features of the first m places; that of degree 0 the context alone
    degrees = [torch.randint(features, (n,), generator=drawn).tolist() for n in hidden]
    masks = [torch.tensor(degrees[0])[:, None] > place]
    masks.append(torch.tensor(degrees[1])[:, None] >= torch.tensor(degrees[0]))
    masks.append(place.repeat(2)[:, None] >= torch.tensor(degrees[1]))
    layers = []
    for i, (low, high) in enumerate(itertools.pairwise([range(1, features + 1), *degrees])):
        orders = order if i == 0 else ranked(low), ranked(high)
        seen = [sum(d <= high[unit] for d in low) for unit in ranked(high)]
        layers.append(ChainLayer(len(high), len(low), True, seen, *orders))
    seen = [sum(d <= j for d in degrees[1]) for j in range(features) for _ in range(2)]
    rows = [k * features + feature for feature in order for k in range(2)]
    layers.append(ChainLayer(2 * features, hidden[1], True, seen, ranked(degrees[1]), rows))
    net = ChainNetwork(layers, "elu", context="joined")
    program = ChainProgram(features, [ElementsStep("softclip", order, order, net)], K)
    tensors = leaves(program, dtype)
    assert tuple(tensors[0].shape) == (17, features + K)
    x = normal(300, features, seed=3, dtype=dtype).requires_grad_()
    context = normal(300, K, seed=4, dtype=dtype).requires_grad_()

    def parameters(x):
        h = torch.cat([x, context], 1)
        whole = [torch.cat([masks[0], torch.ones(17, K, dtype=bool)], 1), *masks[1:]]
        for i, mask in enumerate(whole):
            h = functional.linear(
                functional.elu(h) if i else h, tensors[2 * i] * mask, tensors[2 * i + 1]
            )
        shift, raw = h.chunk(2, 1)
        return shift, raw / (1 + (raw / math.log(1e-3)).abs())

    found = ops.chain(x, program, tensors, context=context, inverse=inverse)
    if inverse:
        y = torch.zeros_like(x)
        for _ in range(features):
            shift, log_scale = parameters(y)
            y = (x - shift) * (-log_scale).exp()
        expected = y, -log_scale.sum(1)
    else:
        shift, log_scale = parameters(x)
        expected = x * log_scale.exp() + shift, log_scale.sum(1)
    agree(found, expected, [x, context, *tensors], dtype)
    spoilt = []
    for t, mask in zip(tensors[::2], masks, strict=True):
        whole = torch.ones(t.shape, dtype=torch.bool)
        whole[:, : mask.shape[1]] = mask
        spoilt += [torch.where(whole, t.detach(), torch.nan), tensors[len(spoilt) + 1]]
    again = ops.chain(x, program, spoilt, context=context, inverse=inverse)
    torch.testing.assert_close(again, found)


# ---- dense networks -----------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("n", [1, 40])
def test_a_residual_network_with_gated_linear_units(backend, n, inverse, dtype):
    """The first layer reads the context, gates multiply what a block adds, raw scales stand before shifts."""
    reads, moves, width = [0, 2, 4], [1, 3], 13
    step = ElementsStep(
        ScaleMap("sigmoid", offset=2.0, eps=1e-3),
        moves,
        reads,
        ChainNetwork(
            [
                ChainLayer(width, 3),
                *[ChainLayer(width, width, context=c) for c in ("none", "gate") * 2],
                ChainLayer(4, width, rows=[2, 3, 0, 1]),
            ],
            "relu",
            residual=True,
            activate_last=False,
            context="joined",
        ),
        "blocked",
    )
    program = ChainProgram(5, [step], K)
    tensors = leaves(program, dtype)
    x = normal(n, 5, seed=3, dtype=dtype).requires_grad_()
    context = normal(n, K, seed=4, dtype=dtype).requires_grad_()
    left = iter(tensors)
    linear = lambda h: functional.linear(h, next(left), next(left))  # noqa: E731
    h = linear(torch.cat([x[:, reads], context], 1))
    for _ in range(2):
        inner = linear(linear(h.relu()).relu())
        h = h + functional.glu(torch.cat([inner, linear(context)], 1), 1)
    raw, shift = linear(h).chunk(2, 1)
    scale = torch.sigmoid(raw + 2) + 1e-3
    moved = (x[:, moves] - shift) / scale if inverse else x[:, moves] * scale + shift
    log_det = (-1 if inverse else 1) * scale.log().sum(1)
    expected = x.index_copy(1, torch.tensor(moves), moved), log_det
    found = ops.chain(x, program, tensors, context=context, inverse=inverse)
    agree(found, expected, [x, context, *tensors], dtype)


def unsorted_steps():
    """Steps with all uses of a context, masked and dense."""
    for seed, context in enumerate(("none", "add", "joined", "activated")):
        plain, blocks = {"context": context}, {"residual": True, "activation": "tanh"}
        steps = [
            autoregressive("exp", [3, 1, 0, 2], (20, 33), activation="elu", **plain),
            autoregressive(
                "tanh", [0, 2, 1, 3], (20,) * 5, activate_last=False, **plain, **blocks
            ),
            coupling("tanh", 4, (20, 33), activation="silu", **plain),
            coupling(SplineMap(bins=3), 4, (20,) * 5, **plain, **blocks),
            coupling("exp", 4, (), swap=True, **plain),
        ]
        for step in steps:
            yield shuffled(step, seed)
            if len(step.network.layers) == 6:
                step = with_contexts(step, {1: "add", 2: "gate", 3: "add"})
                yield shuffled(biased(step, (1, 3)), seed)
    step = with_contexts(coupling("tanh", 4, (5, 7, 6), context="joined"), {1: "add", 2: "add"})
    layers = [replace(layer, bias=False) for layer in biased(step, (1,)).network.layers]
    yield shuffled(replace(step, network=replace(step.network, layers=layers)))


def biased(step, layers):
    """The step, where what these layers add of the context has a bias."""
    changed = [replace(y, context_bias=i in layers) for i, y in enumerate(step.network.layers)]
    return replace(step, network=replace(step.network, layers=changed))


@pytest.mark.parametrize("inverse", [False, True])
def test_an_order_changes_where_weights_lie_and_nothing_else(backend, inverse):
    """Results are those of sorted weights, and gradients lie where the weights do."""
    for step in unsorted_steps():
        given = sample(33, 4, [step], torch.float64)
        program, x, context = given.fixed["program"], given.tensors["x"], given.tensors["context"]
        tensors = [t.requires_grad_() for t in given.tensors["tensors"]]
        layers = [replace(y, rows=None, columns=None) for y in step.network.layers]
        net = replace(step.network, layers=layers)
        straight = replace(step, network=net)
        expected = ops.chain(
            x,
            ChainProgram(4, [straight], program.context_features),
            [placed(t, w, step.network) for t, w in zip(tensors, program.tensors, strict=True)],
            context=context,
            inverse=inverse,
        )
        found = ops.chain(x, program, tensors, context=context, inverse=inverse)
        agree(found, expected, tensors, torch.float64)


def placed(t, wanted, net):
    """A tensor in the order of inputs and units."""
    at = int(wanted.name.split("layers[")[1][0]) if "layers[" in wanted.name else 0
    layer = net.layers[at]
    t = t if layer.rows is None else t[list(layer.rows)]
    if layer.columns is None or not wanted.name.startswith("weight of layers"):
        return t
    return t[:, [*layer.columns, *range(layer.inputs, t.shape[1])]]


def test_orders_may_change_what_a_spline_finds_where(backend):
    """Parameters of all features of one kind first, in weights whose rows have those of one feature together."""
    moves, per = [1, 3], ElementsStep(SplineMap(bins=3), [0]).parameters
    rows = [j * per + k for k in range(per) for j in range(2)]
    nets = ChainLayer(2 * per, 2, rows=rows), ChainLayer(2 * per, 2)
    x = normal(7, 4, dtype=torch.float64)
    tensors = leaves(
        ChainProgram(4, [ElementsStep(SplineMap(bins=3), moves, [0, 2], ChainNetwork([nets[1]]))]),
        torch.float64,
    )
    results = [
        ops.chain(
            x,
            ChainProgram(
                4, [ElementsStep(SplineMap(bins=3), moves, [0, 2], ChainNetwork([y]), layout)]
            ),
            tensors,
        )
        for y, layout in zip(nets, ("blocked", "feature_major"), strict=True)
    ]
    torch.testing.assert_close(*results)
