"""Affine coupling and elementwise affine transforms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes, random_inputs
from pyflowkern import ops

# --- floors --------------------------------------------------------------------------------------


def coupling_forward(share: float) -> Callable[[Inputs, Outputs], int]:
    """Return the bytes of a forward that reads only a ``share`` of ``params``."""
    return lambda i, o: nbytes(i["x"], *o) + int(share * nbytes(i["params"]))


def coupling_backward(share: float) -> Callable[[Inputs, Outputs], int]:
    """Return the bytes of a backward: half of x, its raw scales, the output gradients, and the input gradients."""
    return lambda i, o: (
        nbytes(i["x"]) // 2
        + int(share * nbytes(i["params"])) // 2
        + nbytes(*o)
        + nbytes(i["x"], i["params"])
    )


# --- peers: their layers around a network that returns the given parameters ----------------------


class _Given(torch.nn.Module):
    """Takes the place of a coupling layer's network: returns the given parameters."""

    params: Tensor

    def forward(self, *_: Any) -> Tensor:
        return self.params


def nflows_coupling(inputs: Inputs) -> Provider:
    from nflows.transforms import AffineCouplingTransform

    net, channels = _Given(), inputs["x"].shape[1]
    mask = torch.arange(channels) >= channels - channels // 2
    layer = AffineCouplingTransform(mask, lambda *_: net).to(inputs["x"].device)

    def run(x: Tensor, params: Tensor, inverse: bool = False) -> Any:
        net.params = params
        return layer.inverse(x) if inverse else layer(x)

    return run


def normflows_coupling(inputs: Inputs) -> Provider:
    from normflows.flows import AffineCouplingBlock

    net = _Given()
    layer = AffineCouplingBlock(net, scale_map="exp")

    def run(x: Tensor, params: Tensor, inverse: bool = False) -> Any:
        net.params = params
        return layer.inverse(x) if inverse else layer(x)

    return run


def freia_coupling(activation: str) -> Callable[[Inputs], Provider]:
    def build(inputs: Inputs) -> Provider:
        from FrEIA.modules import AffineCouplingOneSided

        net = _Given()
        layer = AffineCouplingOneSided(
            [tuple(inputs["x"].shape[1:])],
            subnet_constructor=lambda *_: net,
            clamp_activation=activation,
        )

        def run(x: Tensor, params: Tensor, inverse: bool = False) -> Any:
            net.params = params
            return layer([x], rev=inverse)

        return run

    return build


# --- cases ---------------------------------------------------------------------------------------


def coupling(
    name: str,
    x: Sequence[int],
    params: Sequence[int],
    options: dict[str, Any] | None = None,
    *,
    share: float = 1.0,
    channels_last: bool = False,
    peers: dict[str, Callable[[Inputs], Provider]] | None = None,
    **case: Any,
) -> Case:
    """Return a case of ``affine_coupling(x, params, **options)``."""
    return Case(
        name=name,
        make_inputs=random_inputs(channels_last, x=x, params=params),
        providers={
            "eager": partial(ops.affine_coupling_reference, **options or {}),
            "ours": partial(ops.affine_coupling, **options or {}),
            **{peer: Lazy(build) for peer, build in (peers or {}).items()},
        },
        forward_bytes=coupling_forward(share),
        backward_bytes=coupling_backward(share),
        **case,
    )


def of_map(kind: str, peers: Any = None, per_channel: int = 2, **options: Any) -> Case:
    """Return the small case of one scale map, with the libraries that have the same map."""
    x, params = (64, 12, 32, 32), (64, 6 * per_channel, 32, 32)
    options = {"scale_map": kind} | options
    return coupling(f"{kind} 64x12x32x32", x, params, options, peers=peers, extra=True)


IMAGE = (64, 24, 32, 32)
RAW_FIRST = "blocked_raw_first"
CASES = [
    coupling(
        "coupling 64x24x32x32",
        IMAGE,
        IMAGE,
        targets={
            "forward vs eager": 6.0,
            "forward vs compile": 1.4,
            "forward vs floor": 1.5,
            "forward+backward vs eager": 2.5,
            "forward+backward vs compile": 1.6,
        },
    ),
    coupling("channels_last 64x24x32x32", IMAGE, IMAGE, channels_last=True),
    coupling(
        "checkerboard 64x3x32x32",
        (64, 3, 32, 32),
        (64, 6, 32, 32),
        {"split": "checkerboard"},
        share=0.5,
    ),
    coupling(
        "coupling 64x10",
        (64, 10),
        (64, 10),
        targets={"forward vs eager": 1.0, "forward+backward vs eager": 1.0},
    ),
    coupling("coupling 4096x32", (4096, 32), (4096, 32)),
    Case(
        name="affine 64x12x32x32",
        make_inputs=random_inputs(**dict.fromkeys(("x", "raw_scale", "shift"), (64, 12, 32, 32))),
        providers={"eager": ops.affine_reference, "ours": ops.affine},
        backward_bytes=lambda i, o: nbytes(i["x"], i["raw_scale"], *o, *i.values()),
    ),
    of_map("exp", {"normflows": normflows_coupling}, params_layout="interleaved"),
    of_map(
        "tanh",
        {"FrEIA": freia_coupling("TANH")},
        scale_map=ops.ScaleMap("tanh", gain=2.0),
        params_layout=RAW_FIRST,
    ),
    of_map(
        "atan",
        {"FrEIA": freia_coupling("ATAN")},
        scale_map=ops.ScaleMap("atan", gain=2.0),
        params_layout=RAW_FIRST,
    ),
    of_map(
        "sigmoid",
        {"nflows": nflows_coupling},
        scale_map=ops.ScaleMap("sigmoid", offset=2.0, eps=1e-3),
    ),
    of_map("softplus"),
    of_map("softclip"),
    of_map("additive", per_channel=1),
    coupling("bf16 64x24x32x32", IMAGE, IMAGE, dtype=torch.bfloat16, extra=True),
    coupling("fp64 64x24x32x32", IMAGE, IMAGE, dtype=torch.float64, extra=True),
]
