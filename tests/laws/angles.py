"""Steps of angles, of maps for each feature, of scales with mean 0, and of blocks that begin without activation."""

import itertools
from dataclasses import replace

from laws.foreign import shuffled
from pyflowkern.ops import (
    ChainLayer,
    ChainNetwork,
    ElementsStep,
    PermuteStep,
    ScaleMap,
    ShiftStep,
    SplineMap,
)

ANGLE = SplineMap(bins=4, tails="circular", bound=3.5)
LINE = SplineMap(bins=3, bound=4.0)
#: As zuko has it: no least sizes.
SOFTCLIP = SplineMap(
    bins=4,
    bound=3.0,
    parameterization="softclip",
    min_bin_width=0.0,
    min_bin_height=0.0,
)


def dense(inputs, widths, outputs, **options):
    sizes = [inputs, *widths, outputs]
    layers = [ChainLayer(b, a) for a, b in itertools.pairwise(sizes)]
    return ChainNetwork(layers, **options)


def coupling(
    transform, moves, reads, widths=(9, 7), frequencies=None, layout="feature_major", **options
):
    """Features that move by what the others say, some of which are angles."""
    marks = {name: options.pop(name) for name in ("centred", "turned") if name in options}
    step = ElementsStep(transform, moves, layout=layout)
    angles = sum(w != 0 for w in frequencies or ())
    net = dense(len(reads) + angles, widths, step.outputs, frequencies=frequencies, **options)
    return ElementsStep(transform, moves, reads, net, layout, **marks)


def masked(transform, order, hidden=8, depth=2, frequencies=None, turned=False, **options):
    """A masked network of which each feature has one or two inputs, and as many outputs as its map takes."""
    features = len(order)
    inputs = [
        i for i in range(features) for _ in range(1 + bool((frequencies or [0] * features)[i]))
    ]
    degrees = sorted(u % features for u in range(hidden))
    maps = ElementsStep(transform, order).groups
    outputs = [g.begin + j for g in maps for j in range(g.features) for _ in range(g.parameters)]

    def layer(low, high, strict):
        prefixes = [sum(d < e if strict else d <= e for d in low) for e in high]
        return ChainLayer(len(high), len(low), prefixes=prefixes)

    layers = [layer(inputs, degrees, False)]
    layers += [layer(degrees, degrees, False) for _ in range(depth)]
    layers.append(layer(degrees, outputs, True))
    net = ChainNetwork(layers, frequencies=frequencies, **options)
    return ElementsStep(transform, order, order, net, turned=turned)


def angle_flows():
    """Flows of such steps: (features, steps)."""
    blocks = {"residual": True, "activate_last": False, "activate_blocks": False}
    yield (
        4,
        [
            coupling(ANGLE, [0, 2], [3, 1], frequencies=[0.9, 0.9], activation="tanh"),
            ShiftStep(3.5),
            coupling([ANGLE, LINE], [1, 3], [2, 0], frequencies=[0.9, 0.0], activation="tanh"),
        ],
    )
    yield (
        3,
        [
            masked(ANGLE, [2, 0, 1], frequencies=[0.9] * 3, activation="silu"),
            PermuteStep([1, 2, 0]),
        ],
    )
    yield (
        4,
        [
            masked(
                [LINE, ANGLE, ScaleMap("exp"), ANGLE],
                [3, 1, 0, 2],
                frequencies=[0.0, 0.9, 0.0, 0.9],
            ),
            shuffled(
                masked("tanh", [0, 1, 2, 3], frequencies=[1.1, 0.0, 0.9, 0.0], context="joined")
            ),
        ],
    )
    yield (
        5,
        [
            coupling("tanh", [1, 2, 4], [3, 0], centred=True, layout="blocked"),
            coupling(
                ScaleMap("softplus", divide=True, shift_first=True), [0, 3], [4], centred=True
            ),
            ElementsStep("sigmoid", [4, 2], centred=True),
        ],
    )
    yield (
        3,
        [
            coupling(SOFTCLIP, [0, 1], [2], turned=True, context="add", activation="elu"),
            masked(replace(SOFTCLIP, bins=3), [2, 1, 0], turned=True, activation="elu"),
        ],
    )
    yield (
        4,
        [
            masked("affine", [3, 0, 1, 2], depth=2, **blocks),
            coupling("tanh", [0, 1], [2, 3], (6, 6, 6), activation="silu", **blocks),
            masked(
                LINE, [1, 0, 3, 2], 11, 4, activation="gelu", **{**blocks, "activate_last": True}
            ),
        ],
    )
    # Alone: inverses of three steep splines in a row would multiply their rounding beyond that of plain PyTorch.
    yield 3, [ElementsStep([SOFTCLIP, LINE], [0, 2], turned=True)]


def few_angle_flows():
    """The same, small enough for second derivatives."""
    smooth = {"activation": "tanh"}
    yield (
        3,
        [
            coupling([ANGLE, LINE], [0, 2], [1], (4,), frequencies=[0.9], **smooth),
            masked(ANGLE, [2, 0, 1], 4, 0, frequencies=[0.9, 0.0, 0.9], **smooth),
        ],
    )
    yield (
        3,
        [
            coupling("tanh", [1, 2], [0], (4,), centred=True, **smooth),
            masked(replace(SOFTCLIP, bins=2), [2, 1, 0], 4, 0, turned=True, **smooth),
        ],
    )
    blocks = {"residual": True, "activate_last": False, "activate_blocks": False, **smooth}
    yield 3, [masked("exp", [1, 0, 2], 4, 2, **blocks)]
