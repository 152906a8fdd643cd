"""Networks of FrEIA, as its users build them.

Models that only its sources after version 0.2 have take part where those are imported.
"""

import FrEIA.framework as ff
import FrEIA.modules as fm
import torch

__all__ = [
    "GLOW",
    "IMAGES",
    "MODELS",
    "ONE",
    "WITH",
    "D",
    "N",
    "blocks",
    "fc",
    "graph",
    "sequence",
]

D, N = 5, 7
LATER = hasattr(fm, "splines")


def fc(inputs, outputs, activation=torch.nn.ReLU, between=()):
    hidden = [torch.nn.Linear(inputs, 9), activation(), *between, torch.nn.Linear(9, 8)]
    return torch.nn.Sequential(*hidden, activation(), torch.nn.Linear(8, outputs))


def tanh(inputs, outputs):
    return fc(inputs, outputs, torch.nn.Tanh, [torch.nn.Dropout(0.0)])


def conv(inputs, outputs):
    first = torch.nn.Conv2d(inputs, 8, 3, padding=1)
    return torch.nn.Sequential(first, torch.nn.ReLU(), torch.nn.Conv2d(8, outputs, 3, padding=1))


class Net(torch.nn.Module):
    """A network of a user's."""

    def __init__(self, inputs, outputs):
        super().__init__()
        self.inner = (conv if outputs > 100 else fc)(inputs, outputs)

    def forward(self, x):
        return self.inner(x)


def sequence(*blocks, dims=(D,)):
    """Return a SequenceINN of ``(class, condition or None, options)``, whose conditions have 3 and 2 numbers."""
    inn = ff.SequenceINN(*dims)
    for cls, condition, options in blocks:
        given = {} if condition is None else {"cond": condition, "cond_shape": (3 - condition,)}
        inn.append(cls, **given, **options)
    return inn


def blocks(cls, condition=None, count=2, net=fc, **options):
    return sequence(*[(cls, condition, {"subnet_constructor": net, **options})] * count)


def graph(conditions=(), cls=fm.GLOWCouplingBlock, split=False):
    given = [ff.ConditionNode(size) for size in conditions]
    nodes = [ff.InputNode(D)]
    for i in range(2):
        options = {"subnet_constructor": fc}
        nodes.append(ff.Node(nodes[-1], cls, options, conditions=given))
        nodes.append(ff.Node(nodes[-1], fm.PermuteRandom, {"seed": i}))
    if split:
        nodes.append(ff.Node(nodes[-1], fm.Split, {"section_sizes": [2, 3]}))
        last = [ff.OutputNode(nodes[-1].out0), ff.OutputNode(nodes[-1].out1)]
    else:
        last = [ff.OutputNode(nodes[-1])]
    return ff.GraphINN([*nodes, *given, *last], verbose=False)


GLOW, ALL = fm.GLOWCouplingBlock, fm.AllInOneBlock
WITH = {"subnet_constructor": fc}
FIXED = {"M": torch.linalg.qr(torch.ones(D, D).tril() + torch.eye(D))[0] * 1.2}
#: Networks of vectors, each of which is one op.
ONE = {
    "GLOW": lambda: blocks(GLOW),
    "GLOW given": lambda: blocks(GLOW, 0, net=tanh, clamp_activation="TANH"),
    "GLOW uneven": lambda: blocks(GLOW, split_len=1, clamp=1.3, clamp_activation="SIGMOID"),
    "RNVP": lambda: blocks(fm.RNVPCouplingBlock, 0),
    "NICE": lambda: blocks(fm.NICECouplingBlock),
    "one-sided": lambda: blocks(fm.AffineCouplingOneSided, 1),
    "condition alone": lambda: sequence((fm.ConditionalAffineTransform, 0, WITH), (GLOW, 0, WITH)),
    "AllInOne": lambda: blocks(ALL),
    "AllInOne given": lambda: blocks(ALL, 0, 3, permute_soft=True),
    "AllInOne exp": lambda: blocks(ALL, global_affine_type="EXP", reverse_permutation=True),
    "AllInOne sigmoid": lambda: blocks(ALL, global_affine_type="SIGMOID", affine_clamping=1.2),
    "Householder": lambda: blocks(ALL, permute_soft=True, learned_householder_permutation=2),
    "others": lambda: sequence(
        (fm.PermuteRandom, None, {}),
        (GLOW, None, WITH),
        (fm.FixedLinearTransform, None, {**FIXED, "b": torch.arange(D) / 3}),
        (fm.FixedLinearTransform, None, FIXED),
        (fm.HouseholderPerm, None, {"n_reflections": 2}),
        (fm.HouseholderPerm, None, {"n_reflections": 3, "fixed": True}),
        (GLOW, 0, WITH),
    ),
    "ActNorm": lambda: sequence((fm.ActNorm, None, {}), (ALL, None, WITH), (fm.ActNorm, None, {})),
    "graph": graph,
    "graph given": lambda: graph([3, 2]),
}
#: Networks of which one op runs parts, or of which it runs no more than the elementwise ones.
PARTS = {
    "two conditions": lambda: sequence((GLOW, 0, WITH), (GLOW, None, WITH), (ALL, 1, WITH)),
    "mixed": lambda: sequence(
        (GLOW, 0, WITH), (fm.GINCouplingBlock, 0, WITH), (fm.InvAutoAct, None, {}), (ALL, 0, WITH)
    ),
    "own network": lambda: sequence((GLOW, 0, WITH), (GLOW, 0, {"subnet_constructor": Net})),
    "branches": lambda: graph([3], split=True),
}
IMAGES = {
    "AllInOne images": lambda: blocks_of_images(ALL),
    "soft images": lambda: blocks_of_images(ALL, permute_soft=True, global_affine_type="EXP"),
    "many channels": lambda: blocks_of_images(ALL, 18),
    "GLOW images": lambda: blocks_of_images(GLOW),
    "RNVP images": lambda: blocks_of_images(fm.RNVPCouplingBlock, clamp_activation="TANH"),
    "NICE images": lambda: blocks_of_images(fm.NICECouplingBlock),
}
if LATER:
    spline = fm.splines.RationalQuadraticSpline
    ONE["spline"] = lambda: blocks(spline, 0)
    ONE["identity tails"] = lambda: blocks(spline, identity_tails=True, bins=4)
    PARTS["spline, clamped"] = lambda: sequence(
        (spline, None, {**WITH, "domain_clamping": 5.0}), (GLOW, 0, WITH)
    )
MODELS = {**ONE, **PARTS, **IMAGES}


def blocks_of_images(cls, channels=4, **options):
    block = (cls, None, {"subnet_constructor": conv, **options})
    return sequence(block, block, dims=(channels, 6, 6))
