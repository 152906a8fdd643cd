"""ActNorm, and the channel moments from which it is initialised."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes, random_inputs
from pyflowkern import ops

# --- peers: layers that own their parameters, set to those of the first input set ----------------


def nflows_actnorm(inputs: Inputs) -> Provider:
    from nflows.transforms import ActNorm

    layer = ActNorm(inputs["x"].shape[1]).to(inputs["x"].device).eval()
    layer.log_scale.data.copy_(inputs["log_scale"])
    layer.shift.data.copy_(inputs["bias"] * inputs["log_scale"].exp())

    def run(x: Tensor, inverse: bool = False, **_: Tensor) -> Any:
        return layer.inverse(x) if inverse else layer(x)

    return run


def normflows_actnorm(inputs: Inputs) -> Provider:
    from normflows.flows import ActNorm

    x = inputs["x"]
    shape = (x.shape[1], *[1] * (x.dim() - 2))
    layer = ActNorm(shape).to(x.device)
    layer.s.data.copy_(inputs["log_scale"].view(1, *shape))
    layer.t.data.copy_((inputs["bias"] * inputs["log_scale"].exp()).view(1, *shape))
    layer.data_dep_init_done.fill_(1.0)

    def run(x: Tensor, inverse: bool = False, **_: Tensor) -> Any:
        y, log_det = layer.inverse(x) if inverse else layer(x)
        return y, log_det.expand(len(y))

    return run


def freia_actnorm(inputs: Inputs) -> Provider:
    from FrEIA.modules import ActNorm

    layer = ActNorm([tuple(inputs["x"].shape[1:])]).to(inputs["x"].device)
    layer.init_on_next_batch = False
    layer.scale.data.view(-1).copy_(inputs["log_scale"])
    layer.bias.data.view(-1).copy_(inputs["bias"] * inputs["log_scale"].exp())
    return lambda x, inverse=False, **_: layer([x], rev=inverse)


# --- cases ---------------------------------------------------------------------------------------


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read x and the output gradients, write the gradient of x."""
    return 2 * nbytes(inputs["x"]) + nbytes(*outputs)


def actnorm(name: str, shape: Sequence[int], channels_last: bool = False, **case: Any) -> Case:
    return Case(
        name=name,
        make_inputs=random_inputs(channels_last, x=shape, log_scale=shape[1:2], bias=shape[1:2]),
        providers={
            "eager": ops.actnorm_reference,
            "ours": ops.actnorm,
            "nflows": Lazy(nflows_actnorm),
            "normflows": Lazy(normflows_actnorm),
            "FrEIA": Lazy(freia_actnorm),
        },
        backward_bytes=_backward_bytes,
        **case,
    )


def moments(name: str, shape: Sequence[int], channels_last: bool = False) -> Case:
    return Case(
        name=name,
        make_inputs=random_inputs(channels_last, x=shape),
        providers={"eager": ops.channel_moments_reference, "ours": ops.channel_moments},
        passes=("forward",),
    )


IMAGE = (64, 48, 16, 16)
CASES = [
    actnorm(
        "actnorm 64x48x16x16",
        IMAGE,
        targets={"forward+backward vs eager": 2.0, "forward+backward vs compile": 1.2},
    ),
    actnorm("channels_last 64x48x16x16", IMAGE, channels_last=True),
    actnorm("actnorm 64x10", (64, 10)),
    actnorm("actnorm 4096x32", (4096, 32)),
    actnorm("bf16 64x48x16x16", IMAGE, dtype=torch.bfloat16, extra=True),
    moments("moments 64x48x16x16", IMAGE),
    moments("moments 64x48x16x16 channels_last", IMAGE, channels_last=True),
    moments("moments 4096x32", (4096, 32)),
]
