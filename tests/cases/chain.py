"""chain."""

import itertools
from dataclasses import replace
from functools import partial

import torch
from laws import OpCase, Sample, normal
from laws.angles import angle_flows, few_angle_flows
from laws.foreign import few_foreign_flows, foreign_flows, shuffled
from laws.ops import STATES

from cases.autoregressive import MAPS
from cases.spline import every_map
from pyflowkern.core.activations import ACTIVATIONS
from pyflowkern.ops import (
    ActNormStep,
    ChainLayer,
    ChainNetwork,
    ChainProgram,
    ElementsStep,
    LinearStep,
    PermuteStep,
    PLUStep,
    ScaleMap,
    ShiftStep,
    SplineMap,
    chain,
    chain_reference,
)

K = 2


def network(inputs, widths, outputs, **options):
    """A network whose units read all that is below."""
    sizes = itertools.pairwise((inputs, *widths, outputs))
    return ChainNetwork([ChainLayer(b, a) for a, b in sizes], **options)


def coupling(transform, features, widths=(9, 6), swap=False, **options):
    """The first features decide on the last ones, or the other way."""
    first = list(range(features - features // 2))
    last = list(range(len(first), features))
    reads, moves = (last, first) if swap else (first, last)
    step = ElementsStep(transform, moves)
    net = network(len(reads), widths, len(moves) * step.parameters, **options)
    layout = "feature_major" if isinstance(transform, SplineMap) else "blocked"
    return ElementsStep(transform, moves, reads, net, layout)


def with_contexts(step, uses):
    """Let layers of the step's network read the context: ``{layer: "add" or "gate"}``."""
    layers = list(step.network.layers)
    for i, use in uses.items():
        layers[i] = replace(layers[i], context=use)
    return replace(step, network=replace(step.network, layers=layers))


def gated_steps(**options):
    """Networks with gates as Durkan et al. (2019) have them, and whatever else layers do with a context."""
    blocks = {"residual": True, "activation": "silu", **options}
    for step in (
        coupling("tanh", 3, (20,) * 5, activate_last=False, **blocks),
        autoregressive("tanh", [2, 0, 1], (20,) * 5, **blocks),
    ):
        yield with_contexts(step, {2: "gate", 4: "gate"})
        yield with_contexts(step, {1: "add", 2: "gate", 3: "gate", 4: "add"})
    yield with_contexts(coupling("exp", 3, (20, 13, 8), **options), {1: "gate", 2: "add"})
    yield with_contexts(
        autoregressive("exp", [1, 0, 2], (20, 15, 8), **options), {1: "add", 2: "gate"}
    )


def autoregressive(transform, order, widths=(9, 7), context="none", residual=False, **options):
    """A masked network, units sorted by degree as :class:`nn.MaskedMLP` sorts them."""
    features, per = len(order), ElementsStep(transform, [0]).parameters
    least = 0 if context != "none" else min(1, features - 1)
    degrees = [[least + u * (features - least) // w for u in range(w)] for w in widths]
    first = ChainLayer(widths[0], features, prefixes=degrees[0], columns=order)
    layers = [first]
    for low, high in itertools.pairwise(degrees):
        prefixes = [sum(d <= e for d in low) for e in high]
        layers.append(ChainLayer(len(high), len(low), prefixes=prefixes))
    prefixes = [sum(d <= j for d in degrees[-1]) for j in range(features) for _ in range(per)]
    rows = [m * per + k for m in order for k in range(per)]
    layers.append(ChainLayer(per * features, widths[-1], residual is False, prefixes, rows=rows))
    net = ChainNetwork(layers, residual=residual, context=context, **options)
    return ElementsStep(transform, order, order, net)


def value(wanted, i, dtype):
    """A tensor of order one that a step may take."""
    if wanted.integers:
        size = wanted.shape[0]
        return torch.argsort(normal(size, seed=i))
    if wanted.name.startswith("sign"):
        return normal(*wanted.shape, seed=i).sign().to(dtype)
    drawn = normal(*wanted.shape, seed=100 + i, dtype=dtype)
    if wanted.name.startswith("weight of steps"):  # of a matrix: not far from a rotation
        return torch.linalg.qr(drawn.double())[0].to(dtype) + 0.1 * drawn
    return drawn / max(wanted.shape[-1], 1) ** 0.5 if len(wanted.shape) == 2 else 0.5 * drawn


def leaves(program, dtype):
    """Values for the tensors of a program, with gradients."""
    return [value(w, i, dtype).requires_grad_() for i, w in enumerate(program.tensors)]


def called(function):
    """Return the op with the permutations and signs, which have no gradients, apart from the other tensors."""

    def call(x, tensors, program, context=None, constants=None, inverse=False):
        if not isinstance(tensors, list | tuple):
            raise TypeError(f"tensors must be a list, got {type(tensors).__name__}")
        given = list(tensors)
        for i, t in constants or ():
            given.insert(i, t)
        return function(x, program, given, context=context, inverse=inverse)

    return call


def sample(n, features, steps, dtype=torch.float64, base="none", unit=False, inverse=False):
    with_context = any(
        isinstance(s, ElementsStep) and s.network and s.network.contexts for s in steps
    )
    program = ChainProgram(features, steps, K if with_context else 0, base)
    given = [value(w, i, dtype) for i, w in enumerate(program.tensors)]
    names = [w.name.split()[0] for w in program.tensors]
    x = normal(n, features, seed=3)
    tensors = {
        "x": (torch.sigmoid(x) if unit else x).to(dtype),
        "tensors": [
            t for t, w in zip(given, names, strict=True) if w not in ("permutation", "sign")
        ],
        "context": normal(n, K, seed=4, dtype=dtype) if with_context else None,
    }
    constants = tuple((i, given[i]) for i, w in enumerate(names) if w in ("permutation", "sign"))
    options = {"constants": constants} if constants else {}
    return Sample(tensors, program=program, inverse=inverse, **options)


def whole_flows():
    """Flows as people train them: (features, steps)."""
    spline = SplineMap(bins=4)
    yield 6, [autoregressive("softclip", [*range(6)][:: (-1) ** i]) for i in range(3)]
    yield 5, [s for i in range(2) for s in (coupling(spline, 5, swap=i == 1), PLUStep())]
    yield 5, [s for i in range(3) for s in (ActNormStep(), coupling("tanh", 5, swap=i == 1))]
    yield (
        4,
        [
            ShiftStep(3.0),
            autoregressive(SplineMap(bins=3, tails="circular"), [2, 0, 3, 1], context="add"),
            PermuteStep([3, 1, 0, 2]),
            LinearStep(),
            coupling("sigmoid", 4, residual=True, widths=(6, 6, 6), context="add"),
        ],
    )


def samples(dtype):
    for n, (features, steps) in itertools.product((0, 1, 97, 1000), whole_flows()):
        if n < 1000 or dtype == torch.float32:
            yield sample(n, features, steps, dtype)
    yield from each_transform(dtype)
    for (i, activation), residual in itertools.product(enumerate(ACTIVATIONS), (False, True)):
        options = {"activation": activation, "residual": residual, "context": "add"}
        widths = (20, 20, 20) if residual else (20, 33)
        if (i + residual + (dtype == torch.float64)) % 2:
            yield sample(33, 3, [coupling("exp", 3, widths, **options)], dtype)
        else:
            yield sample(33, 3, [autoregressive("tanh", [0, 2, 1], widths, **options)], dtype)
    yield sample(5, 4, [coupling("atan", 4, (7,) * 5, residual=True, activate_last=False)], dtype)
    yield sample(9, 1, [autoregressive("affine", [0], context="add"), PLUStep()], dtype)
    yield sample(9, 70, [autoregressive("affine", [*range(70)], (130, 70))], dtype)
    yield from wide(dtype)
    yield sample(9, 128, [PLUStep(), ActNormStep(), LinearStep()], dtype)
    yield sample(9, 129, [LinearStep(), PermuteStep([*range(1, 129), 0])], dtype)
    own = ElementsStep(SplineMap(bins=5), [3, 0])
    yield sample(40, 4, [own, coupling(SplineMap(bins=2), 4, swap=True), own], dtype)
    yield sample(40, 3, [ElementsStep("softplus", [2, 1], layout="blocked")], dtype)
    yield sample(40, 3, [], dtype)
    yield from contexts(dtype)
    yield from foreign(dtype)


def each_transform(dtype, **options):
    """Every transform in a coupling or an autoregressive step, and in the other one in the other dtype."""
    for i, transform in enumerate((*MAPS, *every_map(3))):
        unit = isinstance(transform, SplineMap) and transform.tails == "none"
        if unit or (i + (dtype == torch.float64)) % 2:
            yield sample(17, 5, [coupling(transform, 5)], dtype, unit=unit, **options)
        else:
            yield sample(17, 4, [autoregressive(transform, [1, 3, 0, 2])], dtype, **options)


def foreign(dtype, inverse=False):
    flows = *foreign_flows(), *angle_flows()
    for n, (features, steps) in itertools.product((0, 1, 20, 300), flows):
        yield sample(n, features, steps, dtype, inverse=inverse)
    yield sample(20, 4, [shuffled(autoregressive("exp", [2, 0, 1, 3]))], dtype, inverse=inverse)
    yield sample(20, 5, [shuffled(coupling("tanh", 5, context="add"))], dtype, inverse=inverse)


def contexts(dtype, inverse=False):
    for n, context in ((1, "none"), (20, "none"), (20, "add"), (300, "add")):
        for step in gated_steps(context=context):
            yield sample(n, 3, [step], dtype, inverse=inverse)


def wide(dtype):
    """Networks whose weights are packed first, of so many samples that tiles are the largest.

    All are smooth: of so many units, the input of one is near a kink.
    """
    smooth = {"activation": "tanh", "context": "add"}
    for n in (256, 600):
        steps = [coupling("softclip", 5, (161, 170), **smooth), PermuteStep([2, 3, 4, 0, 1])]
        steps.append(coupling("exp", 5, (164,) * 3, residual=True, activation="silu"))
        steps.append(autoregressive("tanh", [3, 1, 0, 2, 4], (163, 150), **smooth))
        yield sample(n, 5, steps, dtype)


def small(dtype):
    tanh = {"activation": "tanh"}
    layers = [
        autoregressive("exp", [2, 0, 1], (4, 5), context="add", **tanh),
        PermuteStep([1, 2, 0]),
        coupling(ScaleMap("softplus", eps=1e-3, divide=True), 3, (4,), context="add", **tanh),
    ]
    yield sample(4, 3, layers, dtype)
    splines = [coupling(SplineMap(bins=2), 3, (4,) * 3, residual=True, activation="silu")]
    yield sample(4, 3, [*splines, ActNormStep()], dtype)
    yield sample(4, 3, [PLUStep(), ShiftStep(4.0)], dtype)
    own = ElementsStep(SplineMap(bins=2), [0, 2])
    residual = autoregressive("tanh", [0, 1, 2], (5,) * 3, residual=True, activation="softplus")
    yield sample(4, 3, [own, residual], dtype)

    options = {"residual": True, "activation": "tanh"}
    gated = (
        coupling("tanh", 3, (4,) * 3, **options),
        autoregressive("exp", [2, 0, 1], (4,) * 3, **options),
    )
    yield sample(4, 3, [with_contexts(step, {1: "add", 2: "gate"}) for step in gated], dtype)
    for features, steps in (*few_foreign_flows(), *few_angle_flows()):
        yield sample(4, features, steps, dtype)


def densities(dtype):
    """Of a base, and of matrices whose log-determinant is what the caller says."""
    for n in (0, 1, 97):
        for features, steps in whole_flows():
            yield sample(n, features, [*steps, LinearStep()], dtype, "normal")
        yield sample(n, 3, [], dtype, "normal")


def inverse_flows():
    """Flows that also run from latent to data."""
    yield from whole_flows()
    own = ElementsStep(SplineMap(bins=5, tails="circular"), [3, 0])
    angles = coupling(SplineMap(bins=3, tails="circular"), 4, residual=True, widths=(6, 6, 6))
    yield 4, [ShiftStep(3.0), own, PermuteStep([3, 1, 0, 2]), LinearStep(), angles]
    yield 3, [coupling("softplus", 3, (20,), context="add", activation="gelu"), ActNormStep()]


def inverses(dtype):
    for n, (features, steps) in itertools.product((0, 1, 97, 300), inverse_flows()):
        yield sample(n, features, steps, dtype, inverse=True)
    yield from each_transform(dtype, inverse=True)
    for activation, residual in itertools.product(ACTIVATIONS, (False, True)):
        options = {"activation": activation, "residual": residual, "context": "add"}
        widths = (20,) * 5 if residual else (20, 33)
        step = autoregressive("tanh", [0, 2, 1], widths, **options)
        yield sample(33, 3, [step], dtype, inverse=True)
    yield sample(9, 70, [autoregressive("affine", [*range(70)], (130, 70))], dtype, inverse=True)
    for step in reads_what_passes():
        yield sample(20, 4, [step], dtype, inverse=True)
    yield from contexts(dtype, inverse=True)
    yield from foreign(dtype, inverse=True)


def reads_what_passes():
    """Steps that move some of the features which their networks read, in an order of their own."""
    layers = [
        ChainLayer(5, 3, prefixes=[0, 1, 1, 2, 2]),
        ChainLayer(4, 5, prefixes=[0, 1, 1, 3]),
    ]
    yield ElementsStep(
        "tanh",
        [3, 1],
        [2, 3, 1],
        ChainNetwork([layers[0], ChainLayer(4, 5, prefixes=[1, 3, 3, 5])]),
    )
    yield ElementsStep("tanh", [2, 0], [2, 0, 1], ChainNetwork(layers), layout="blocked")
    dense = ChainNetwork([ChainLayer(6, 3, prefixes=[1] * 6), ChainLayer(4, 6)])
    yield ElementsStep("exp", [0, 2], [3, 0, 2], dense, layout="blocked")
    yield ElementsStep(
        "exp", [1, 0], [3, 0], ChainNetwork([ChainLayer(4, 2, prefixes=[0, 1, 1, 1])])
    )


def few_inverses(dtype):
    net = coupling("tanh", 3, (4,), context="add", activation="elu")
    yield sample(4, 3, [net, ActNormStep(), PLUStep()], dtype, inverse=True)
    yield sample(4, 3, [coupling(SplineMap(bins=2), 3), ShiftStep(4.0)], dtype, inverse=True)
    options = {"context": "add", "activation": "tanh"}
    masked = autoregressive("exp", [2, 0, 1], (4, 5), **options)
    yield sample(4, 3, [masked, PermuteStep([1, 2, 0])], dtype, inverse=True)
    masked = autoregressive(SplineMap(bins=2), [0, 2, 1], (5,) * 3, residual=True, **options)
    yield sample(4, 3, [with_contexts(masked, {1: "add", 2: "gate"})], dtype, inverse=True)
    for features, steps in few_angle_flows():
        yield sample(4, features, steps, dtype, inverse=True)


def few_densities(dtype):
    net = coupling("tanh", 3, (4,), context="add", activation="elu")
    yield sample(4, 3, [LinearStep(), net, ActNormStep()], dtype, "normal")
    yield sample(4, 3, [], dtype, "normal")


def large(base="none"):
    of_angles = [*angle_flows()][2::2] if base == "none" else []
    flows = *whole_flows(), *of_angles
    return [sample(1000, f, steps, torch.float32, base) for f, steps in flows]


def by_reference(drawn):
    program, inverse = drawn.fixed["program"], drawn.fixed["inverse"]
    return program.special or (inverse and program.autoregressive)


of_chains = partial(
    OpCase,
    called(chain),
    called(chain_reference),
    floor=128,
    reason="a rounding of an early transform goes through all later ones, and near a knot through a slope",
    conditioned=4,
    rows={"x": 0, "context": 0},
    dtypes=STATES,
    by_reference=by_reference,
)
CASES = [
    of_chains(samples, small, large=large, log_det=True, name="chain"),
    of_chains(inverses, few_inverses, log_det=True, name="inverse of a chain"),
    of_chains(densities, few_densities, large=lambda: large("normal"), name="chain with a base"),
]
