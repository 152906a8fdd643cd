"""Typical flows of zuko, each as it is and accelerated."""

import copy

import torch
import zuko
from torch.distributions import AffineTransform
from zuko.flows import MAF, NCSF, NICE, NSF, Flow, MaskedAutoregressiveTransform, RealNVP
from zuko.lazy import UnconditionalTransform
from zuko.transforms import LULinearTransform, PermutationTransform, RotationTransform

import pyflowkern
from laws.draws import normal

D, K = 5, 3
SMALL = {"transforms": 2, "hidden_features": (9, 8)}
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


def _standardized(context=0):
    """A flow as sbi builds it."""
    flow = MAF(D, context, **SMALL)
    first = UnconditionalTransform(
        AffineTransform, loc=torch.randn(D), scale=torch.rand(D) + 0.5, buffer=True
    )
    return Flow([first, *flow.transform.transforms], flow.base)


def _mixed(context=0):
    flow = MAF(D, context, **SMALL)
    first, second = flow.transform.transforms
    transforms = [
        UnconditionalTransform(PermutationTransform, torch.randperm(D), buffer=True),
        first,
        UnconditionalTransform(RotationTransform, torch.randn(D, D)),
        second,
        UnconditionalTransform(LULinearTransform, torch.randn(D, D) + 3 * torch.eye(D)),
    ]
    return Flow(transforms, flow.base)


def _single(context=0):
    return Flow(MaskedAutoregressiveTransform(D, context, order=[3, 1, 4, 0, 2]), MAF(D).base)


def _inverse(context=0):
    made = MaskedAutoregressiveTransform(D, context, hidden_features=(9,))
    return Flow([made.inv], MAF(D).base)


#: Flows that are one op with the density of their base.
ONE_OP = {
    "MAF": lambda c=0: MAF(D, c, **SMALL),
    "random orders": lambda c=0: MAF(D, c, randperm=True, **SMALL),
    "two passes": lambda c=0: MAF(D, c, passes=2, **SMALL),
    "three passes": lambda c=0: NSF(D, c, passes=3, **SMALL),
    "NSF": lambda c=0: NSF(D, c, bins=4, activation=torch.nn.ELU, **SMALL),
    "slope": lambda c=0: NSF(D, c, bins=3, slope=0.02, transforms=2, hidden_features=(9,)),
    "NICE": lambda c=0: NICE(D, c, **SMALL),
    "RealNVP": lambda c=0: RealNVP(D, c, randmask=True, activation=torch.nn.Tanh, **SMALL),
    "additive": lambda c=0: NICE(
        D, c, univariate=zuko.transforms.AdditiveTransform, shapes=[()], **SMALL
    ),
    "blocks": lambda c=0: NSF(
        D, c, bins=4, residual=True, transforms=2, hidden_features=(9, 9), randperm=True
    ),
    "blocks, affine": lambda c=0: MAF(
        D, c, residual=True, activation=torch.nn.ELU, transforms=2, hidden_features=(9,) * 3
    ),
    "NCSF": lambda c=0: NCSF(D, c, bins=4, **SMALL),
    "NCSF of couplings": lambda c=0: NCSF(D, c, bins=4, passes=2, **SMALL),
    "standardized": _standardized,
    "mixed": _mixed,
    "single": _single,
    "inverse": _inverse,
    "one feature": lambda c=0: NSF(1, c, bins=4, **SMALL),
    "one feature, affine": lambda c=0: MAF(1, c, **SMALL),
}
#: Flows whose splines are ops, with networks of zuko.
OWN_OP = {
    "blocks of two widths": lambda c=0: NSF(
        D, c, bins=4, residual=True, transforms=2, hidden_features=(8, 9)
    ),
    "normalized": lambda c=0: Flow(
        [
            zuko.flows.GeneralCouplingTransform(
                D,
                c,
                univariate=zuko.transforms.MonotonicRQSTransform,
                shapes=[(4,), (4,), (3,)],
                normalize=True,
            )
        ],
        MAF(D).base,
    ),
    "softsign": lambda c=0: NSF(D, c, activation=torch.nn.Softsign, passes=2, **SMALL),
}
FLOWS = {**ONE_OP, **OWN_OP}


def make(name, context=0, dtype=torch.float64):
    """Return a flow as it is, and an accelerated copy; their parameters are not those they start with."""
    torch.manual_seed(0)
    flow = FLOWS[name](context).to(dtype)
    with torch.no_grad():
        for p in flow.parameters():
            p.add_(torch.randn_like(p), alpha=0.2)
    twin = copy.deepcopy(flow)
    report = pyflowkern.accelerate(twin, strict=True)
    assert {e.runs for e in report.entries} == {"one op" if name in ONE_OP else "own op"}
    torch.testing.assert_close(twin.state_dict(), flow.state_dict(), rtol=0, atol=0)
    return flow, twin


def data(flow, *lead, dtype=torch.float64):
    """Return samples of the size that a flow takes, some of them outside of splines."""
    features = next(flow.base.buffers()).shape
    x = 2 * normal(*lead, *features, dtype=dtype)
    return x.clamp(-3, 3) if isinstance(flow, NCSF) else x  # angles


def context(size, *lead, dtype=torch.float64):
    """Return a context for so many numbers of it, None for 0."""
    return normal(*lead, size, seed=1, dtype=dtype) if size else None
