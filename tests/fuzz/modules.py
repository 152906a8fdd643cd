"""Random layers and flows: constructors with hostile arguments, and the laws of a bijection with hostile numbers."""

import inspect
import math

import torch

from fuzz.check import Finding, copied, same_bits
from fuzz.draw import Draw
from pyflowkern import flows, nn

#: A valid construction of each: the class, its arguments, and the shape of a sample.
LAYERS = {
    "ActNorm": lambda: (nn.ActNorm, {"channels": 4}, (4,)),
    "InvertibleLinear": lambda: (nn.InvertibleLinear, {"channels": 4}, (4,)),
    "InvertibleConv1x1": lambda: (nn.InvertibleConv1x1, {"channels": 4}, (4, 3, 3)),
    "AffineCoupling": lambda: (
        nn.AffineCoupling,
        {"channels": 4, "conditioner": nn.MLP, "split": "channel", "swap": False, "scale_map": "tanh"},
        (4,),
    ),
    "AdditiveCoupling": lambda: (
        nn.AdditiveCoupling,
        {"channels": 4, "conditioner": nn.MLP, "split": "channel", "swap": False},
        (4,),
    ),
    "SplineCoupling": lambda: (
        nn.SplineCoupling,
        {"channels": 4, "conditioner": nn.MLP, "split": "channel", "swap": False},
        (4,),
    ),
    "Permute": lambda: (nn.Permute, {"channels": 4}, (4,)) if hasattr(nn, "Permute") else None,
    "Reverse": lambda: (nn.Reverse, {"channels": 4}, (4,)),
    "CircularShift": lambda: (nn.CircularShift, {"channels": 4, "bound": math.pi, "learned": True}, (4,)),
}  # fmt: skip
FLOWS = {
    "RealNVP": lambda: (flows.RealNVP, {"event_shape": 3, "steps": 2, "hidden": 8}, (3,)),
    "Glow": lambda: (
        flows.Glow,
        {"event_shape": (2, 4, 4), "levels": 1, "steps": 1, "hidden": 8},
        (2, 4, 4),
    ),
    "MAF": lambda: (flows.MAF, {"features": 3, "transforms": 2, "hidden": (8,)}, (3,)),
    "IAF": lambda: (flows.IAF, {"features": 3, "transforms": 2, "hidden": (8,)}, (3,)),
    "NSF": lambda: (flows.NSF, {"features": 3, "transforms": 2, "hidden": (8,), "bins": 4}, (3,)),
    "CNF": lambda: (
        flows.CNF,
        {"features": 3, "hidden": (8,), "method": "rk4", "step_size": 0.5},
        (3,),
    ),
    "FFJORD": lambda: (
        flows.FFJORD,
        {"features": 3, "hidden": (8,), "method": "rk4", "step_size": 0.5},
        (3,),
    ),
}
TARGETS = {**{f"nn.{name}": make for name, make in LAYERS.items() if make()},
           **{f"flows.{name}": make for name, make in FLOWS.items()}}  # fmt: skip


def build(make):
    """Return the class, its arguments under the names that the class has for them, and a sample's shape."""
    kind, arguments, shape = make()
    first = next(iter(inspect.signature(kind).parameters))
    key = next(iter(arguments))
    return kind, {first: arguments.pop(key), **arguments}, shape


def run_case(make, seed):
    draw = Draw(seed, ("plain", "wide", "edges", "extreme")[seed // 2 % 4], torch.float32)
    kind, arguments, shape = build(make)
    torch.manual_seed(seed)
    if seed % 2:
        hostile_constructor(kind, arguments, draw)
    else:
        hostile_numbers(kind(**arguments).eval(), shape, draw)


def hostile_constructor(kind, arguments, draw):
    """Each wrong argument is a ValueError or a TypeError; what is taken makes a module that runs or says why not."""
    known = [name for name in inspect.signature(kind).parameters if name not in ("kwargs", "args")]
    name = draw.choice(known)
    value = draw.hostile()
    if isinstance(value, int) and value > 10**6:  # so many channels are no fault but a wish
        value = -7
    arguments = arguments | {name: value}
    try:
        kind(**arguments)
    except (ValueError, TypeError):
        return
    except Exception as error:
        raise Finding(f"{name}={str(value)[:60]!r}: {type(error).__name__}: {error}") from error


def hostile_numbers(module, shape, draw):
    """A sample of NaN or inf changes no bit of the others, in both directions, and nothing raises."""
    n = draw.choice((2, 3, 17, 65))
    x = draw.tensor(n, *shape)
    bad = draw.random.randrange(n)
    spoilt = copied(x)
    spoilt[bad] = draw.choice((math.nan, math.inf, -math.inf, 1e30))
    others = torch.arange(n) != bad
    directions = [module.forward, module.inverse]
    if isinstance(module, flows.Flow):
        directions = [module.log_prob, module.forward]
    for run in directions:
        try:
            with torch.no_grad():
                good, found = run(x), run(spoilt)
        except Exception as error:
            raise Finding(f"{run.__name__}: {type(error).__name__}: {error}") from error
        good, found = ((t,) if isinstance(t, torch.Tensor) else t for t in (good, found))
        for a, b in zip(good, found, strict=True):
            if not same_bits(a[others], b[others]):
                raise Finding(f"{run.__name__}: a bad sample changes others")
