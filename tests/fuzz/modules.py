"""Random layers, networks and flows: constructors with hostile arguments, and bad samples among good ones."""

import inspect
import math

import torch

from fuzz.check import Finding, copied, same_bits
from fuzz.draw import MODES, Draw
from pyflowkern import flows, nn
from pyflowkern.ops import SplineMap


def conv(a, b):
    return nn.ConvNet(a, b, hidden=4)


#: Valid arguments of each class, and the shape of a sample; functions, as each case wants modules of its own.
MODULES = {
    "nn.ActNorm": lambda: ({"channels": 4}, (4,)),
    "nn.AdditiveCoupling": lambda: ({"channels": 4, "conditioner": nn.MLP}, (4,)),
    "nn.AffineCoupling": lambda: ({"channels": 4, "conditioner": conv}, (4, 2, 3)),
    "nn.BatchNorm": lambda: ({"channels": 4}, (4,)),
    "nn.CircularShift": lambda: ({"channels": 4}, (4,)),
    "nn.ConvNet": lambda: ({"in_channels": 3, "out_channels": 2, "hidden": 4}, (3, 4, 4)),
    "nn.Dequantize": lambda: ({"bits": 8}, (3,)),
    "nn.GINCoupling": lambda: ({"channels": 6, "conditioner": nn.MLP}, (6,)),
    "nn.GlowStep": lambda: ({"channels": 4}, (4, 3, 3)),
    "nn.Inverse": lambda: ({"bijection": nn.ActNorm(3)}, (3,)),
    "nn.InvertibleConv1x1": lambda: ({"channels": 4}, (4, 3, 3)),
    "nn.InvertibleLinear": lambda: ({"channels": 4}, (4,)),
    "nn.Logit": lambda: ({"alpha": 0.05}, (3,)),
    "nn.MLP": lambda: ({"in_features": 3, "out_features": 2, "hidden": 8}, (3,)),
    "nn.MaskedAutoregressive": lambda: ({"features": 3, "hidden": (8,)}, (3,)),
    "nn.MaskedMLP": lambda: ({"features": 3, "outputs": 2, "hidden": (8,)}, (3,)),
    "nn.MixedSplineCoupling": lambda: (
        {"channels": 2, "conditioner": nn.MLP, "splines": [SplineMap(), SplineMap(bins=4)]},
        (2,),
    ),
    "nn.MultiScale": lambda: (
        {
            "event_shape": (4, 2, 2),
            "levels": [nn.ActNorm(4), nn.ActNorm(2)],
            "splits": [nn.Split(4)],
        },
        (4, 2, 2),
    ),
    "nn.PeriodicInput": lambda: (
        {"in_features": 2, "out_features": 3, "conditioner": nn.MLP},
        (2,),
    ),
    "nn.Permutation": lambda: ({"permutation": [2, 0, 1]}, (3,)),
    "nn.ResidualConvNet": lambda: ({"in_channels": 3, "out_channels": 2, "hidden": 4}, (3, 4, 4)),
    "nn.ResidualMLP": lambda: ({"in_features": 3, "out_features": 2, "hidden": 8}, (3,)),
    "nn.Reverse": lambda: ({"channels": 4}, (4,)),
    "nn.SplineCoupling": lambda: ({"channels": 4, "conditioner": nn.MLP}, (4,)),
    "nn.Split": lambda: ({"channels": 4}, (4,)),
    "nn.Squeeze": lambda: ({"factor": 2}, (3, 4, 4)),
    "nn.Standardize": lambda: ({"channels": 4}, (4,)),
    "nn.VectorField": lambda: ({"net": nn.MLP(3, 2)}, None),
    "nn.VectorFieldConv": lambda: ({"channels": 2, "hidden": (4,)}, None),
    "nn.VectorFieldMLP": lambda: ({"dims": 3, "hidden": (8,)}, None),
    "nn.VectorFieldUNet": lambda: ({"channels": 2, "widths": (4, 4)}, None),
    "flows.CNF": lambda: (
        {"event_shape": 3, "hidden": (8,), "method": "rk4", "step_size": 0.5},
        (3,),
    ),
    "flows.FlowMatching": lambda: (
        {"event_shape": 3, "hidden": (8,), "method": "rk4", "step_size": 0.5},
        (3,),
    ),
    "flows.ContinuousBijection": lambda: (
        {"field": nn.VectorFieldMLP(3, (8,)), "method": "rk4", "step_size": 0.5},
        (3,),
    ),
    "flows.FFJORD": lambda: (
        {"event_shape": 3, "hidden": (8,), "method": "rk4", "step_size": 0.5},
        (3,),
    ),
    "flows.Flow": lambda: ({"bijection": nn.ActNorm(3), "event_shape": (3,)}, (3,)),
    "flows.Glow": lambda: (
        {"event_shape": (2, 4, 4), "levels": 1, "steps": 1, "hidden": 8},
        (2, 4, 4),
    ),
    "flows.IAF": lambda: ({"event_shape": 3, "transforms": 2, "hidden": (8,)}, (3,)),
    "flows.LazyFlow": lambda: ({"flow": flows.MAF(3, transforms=1, hidden=8)}, None),
    "flows.MAF": lambda: ({"event_shape": 3, "transforms": 2, "hidden": (8,)}, (3,)),
    "flows.MixtureOfGaussians": lambda: ({"dims": 3, "components": 2}, None),
    "flows.NSF": lambda: ({"event_shape": 3, "transforms": 2, "hidden": (8,), "bins": 4}, (3,)),
    "flows.NegativeLogLikelihood": lambda: (
        {"flow": flows.MAF(3, transforms=1, hidden=8)},
        None,
    ),
    "flows.RealNVP": lambda: ({"event_shape": 3, "steps": 2, "hidden": 8}, (3,)),
    "flows.StandardNormal": lambda: ({"dims": 3}, None),
    "flows.Uniform": lambda: ({"dims": 3}, None),
}
#: What takes no part: a base class, what others return, and a list of layers.
LEFT_OUT = {
    "nn.Bijection",
    "nn.BijectionTransform",
    "nn.Sequential",
    "flows.ContinuousTerms",
    "flows.FlowDistribution",
}


def class_of(name):
    package, _, kind = name.partition(".")
    return getattr({"nn": nn, "flows": flows}[package], kind)


def run_case(name, seed, *, crashes_only=False):
    """Run one case; raises ``Finding`` where a rule does not hold."""
    draw = Draw(seed, MODES[seed // 2 % len(MODES)], torch.float32)
    arguments, shape = MODULES[name]()
    torch.default_generator.manual_seed(seed)
    if seed % 2 or shape is None:
        hostile_constructor(class_of(name), arguments, draw)
    else:
        bad_sample(class_of(name)(**arguments).eval(), shape, draw, crashes_only)


def hostile_constructor(kind, arguments, draw):
    """A wrong argument is a ValueError or a TypeError."""
    known = [name for name in inspect.signature(kind).parameters if name not in ("kwargs", "args")]
    name = draw.choice(known)
    value = draw.hostile()
    if isinstance(value, int) and value > 10**6:  # so many channels are no fault but a wish
        value = -7
    try:
        kind(**arguments | {name: value})
    except (ValueError, TypeError):
        return
    except Exception as error:
        raise Finding(f"{name}={str(value)[:60]!r}: {type(error).__name__}: {error}") from error


def samples(module, shape, draw):
    """Draw samples for a module."""
    x = draw.tensor(draw.choice((2, 3, 17, 65)), *shape)
    return x.clamp(0, 1) if isinstance(module, nn.Dequantize) else x


def directions_of(module, shape):
    """Return the methods that map samples of this shape."""
    if isinstance(module, flows.Flow):
        directions = [module.log_prob, module.forward]
        return directions + ([module.inverse] if len(shape) == 1 else [])
    if isinstance(module, nn.Bijection) and module.output_shape(shape) == shape:
        return [module.forward, module.inverse]
    return [module.forward]


def bad_sample(module, shape, draw, crashes_only):
    """A sample of NaN or inf changes no bit of the others, in both directions, and nothing raises."""
    x = samples(module, shape, draw)
    bad = draw.random.randrange(len(x))
    spoilt = copied(x)
    spoilt[bad] = draw.choice((math.nan, math.inf, -math.inf, 1e30))
    for run in directions_of(module, shape):
        found = results(run, spoilt)
        if crashes_only:
            continue
        others = torch.arange(len(x)) != bad
        for a, b in zip(results(run, x), found, strict=True):
            if not same_bits(a[others], b[others]):
                raise Finding(f"{run.__name__}: a bad sample changes others")


def results(run, x):
    """Return the tensors that a method gives, with random numbers from one seed; any error is a finding."""
    try:
        with torch.no_grad():
            torch.default_generator.manual_seed(0)
            found = run(x)
    except Exception as error:
        raise Finding(f"{run.__name__}: {type(error).__name__}: {error}") from error
    return (found,) if isinstance(found, torch.Tensor) else tuple(found)
