"""Networks of FrEIA, as its users build them."""

import FrEIA.framework as ff
import FrEIA.modules as fm
import torch

from laws import freia_later

__all__ = [
    "GLOW",
    "IMAGES",
    "MODELS",
    "ONE",
    "WITH",
    "D",
    "Elementwise",
    "Linear",
    "N",
    "blocks",
    "fc",
    "graph",
    "sequence",
]

D, N = 5, 7
OBLONG = (-1.0, 2.0, -4.0, 5.0)
splines = getattr(fm, "splines", freia_later)
Spline = splines.RationalQuadraticSpline
LaterActNorm = fm.ActNorm if splines is not freia_later else freia_later.ActNorm
Elementwise = splines.ElementwiseRationalQuadraticSpline
Linear = splines.LinearSpline


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
    "GIN": lambda: blocks(fm.GINCouplingBlock, 0),
    "GIN in blocks": lambda: blocks(ALL, gin_block=True, permute_soft=True),
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
    "later ActNorm": lambda: sequence((LaterActNorm, None, {}), (ALL, None, WITH)),
    "spline": lambda: blocks(Spline, 0),
    "identity tails": lambda: blocks(Spline, identity_tails=True, bins=4),
    "elementwise": lambda: sequence(
        (Elementwise, None, {"identity_tails": True}),
        (GLOW, 0, WITH),
        (Elementwise, None, {"domain_clamping": 4.0}),
        (Elementwise, None, {"domain_clamping": 4.0, "default_domain": OBLONG}),
    ),
    "graph": graph,
    "graph given": lambda: graph([3, 2]),
}
#: Networks of which one op runs parts, or of which it runs no more than the elementwise ones.
PARTS = {
    "two conditions": lambda: sequence((GLOW, 0, WITH), (GLOW, None, WITH), (ALL, 1, WITH)),
    "mixed": lambda: sequence(
        (GLOW, 0, WITH), (fm.GINCouplingBlock, 0, WITH), (fm.InvAutoAct, None, {}), (ALL, 0, WITH)
    ),
    "clamped": lambda: blocks(Spline, 0, domain_clamping=5.0),
    "clamped, with identity tails": lambda: sequence(
        (Spline, None, {**WITH, "domain_clamping": 5.0, "identity_tails": True}), (GLOW, 0, WITH)
    ),
    "linear splines": lambda: sequence(
        (Linear, 0, WITH),
        (Linear, None, {**WITH, "identity_tails": True, "bins": 4}),
        (Linear, None, {**WITH, "default_domain": OBLONG, "domain_clamping": 5.0}),
        (Linear, 1, {**WITH, "domain_clamping": 4.0, "identity_tails": True, "split_len": 1}),
        (Linear, None, {**WITH, "min_bin_sizes": (0.0, 0.2)}),
    ),
    "oblong": lambda: blocks(Spline, default_domain=OBLONG),
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
    "GIN images": lambda: blocks_of_images(fm.GINCouplingBlock),
    "spline images": lambda: blocks_of_images(Spline, domain_clamping=4.0, bins=5),
    "linear splines of images": lambda: blocks_of_images(Linear, domain_clamping=4.0, bins=5),
    "GIN in blocks of images": lambda: blocks_of_images(ALL, gin_block=True),
}
MODELS = {**ONE, **PARTS, **IMAGES}


def blocks_of_images(cls, channels=4, **options):
    block = (cls, None, {"subnet_constructor": conv, **options})
    return sequence(block, block, dims=(channels, 6, 6))
