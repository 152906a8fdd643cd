"""Dequantization, quantization and the logit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes
from pyflowkern import ops

# --- plain PyTorch, and peers --------------------------------------------------------------------


def plain_dequantize(x: Tensor, alpha: float | None = None) -> tuple[Tensor, Tensor]:
    """Dequantize with torch's noise: the reference, whose Philox generator runs in int64, would be no fair baseline."""
    v = (x + torch.rand(x.shape, device=x.device)) / 256
    log_det = torch.full((len(x),), -8 * math.log(2) * x[0].numel(), device=x.device)
    if alpha is None:
        return v, log_det
    y, slope = ops.logit_reference(v, alpha=alpha)
    return y, log_det + slope


def nflows_logit(inputs: Inputs) -> Provider:
    from nflows.transforms import Logit

    layer = Logit(eps=0.0)
    return lambda x, inverse=False: layer.inverse(x) if inverse else layer(x)


def normflows_logit(inputs: Inputs) -> Provider:
    from normflows.transforms import Logit

    layer = Logit(alpha=0.05)  # its forward is from latent to data
    return lambda x, inverse=False: layer(x) if inverse else layer.inverse(x)


# --- cases ---------------------------------------------------------------------------------------


def random_bytes(shape: Sequence[int], channels_last: bool = False) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        x = torch.randint(0, 256, tuple(shape), generator=generator, device=device)
        x = x.to(torch.uint8)
        return {"x": x.contiguous(memory_format=torch.channels_last) if channels_last else x}

    return make


def random_units(shape: Sequence[int]) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        x = torch.rand(tuple(shape), generator=generator, device=device) * 0.998 + 0.001
        return {"x": x.to(dtype)}

    return make


def random_reals(shape: Sequence[int], scale: float) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        y = torch.randn(tuple(shape), generator=generator, device=device)
        return {"y": (y * scale).to(dtype)}

    return make


def dequantize(
    name: str, shape: Sequence[int], alpha: float | None, channels_last: bool = False, **case: Any
) -> Case:
    return Case(
        name=name,
        make_inputs=random_bytes(shape, channels_last),
        providers={
            "eager": partial(plain_dequantize, alpha=alpha),
            # its noise differs from eager's; tests compare it with the reference
            "ours": Lazy(lambda _: partial(ops.dequantize, alpha=alpha), comparable=False),
        },
        passes=("forward",),
        **case,
    )


def quantize(name: str, shape: Sequence[int], alpha: float | None) -> Case:
    return Case(
        name=name,
        make_inputs=random_reals(shape, 1.0),
        providers={
            "eager": partial(ops.quantize_reference, alpha=alpha),
            # rounding may move a value across the edge between two levels
            "ours": Lazy(lambda _: partial(ops.quantize, alpha=alpha), comparable=False),
        },
        passes=("forward",),
    )


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read x and the output gradients, write the gradient of x."""
    return 2 * nbytes(inputs["x"]) + nbytes(*outputs)


def logit(
    name: str,
    shape: Sequence[int],
    alpha: float = 0.05,
    peers: dict[str, Callable[[Inputs], Provider]] | None = None,
    **case: Any,
) -> Case:
    return Case(
        name=name,
        make_inputs=random_units(shape),
        providers={
            "eager": partial(ops.logit_reference, alpha=alpha),
            "ours": partial(ops.logit, alpha=alpha),
            **{peer: Lazy(build) for peer, build in (peers or {}).items()},
        },
        backward_bytes=_backward_bytes,
        **case,
    )


CIFAR, BATCH = (64, 3, 32, 32), (512, 3, 32, 32)
FLOOR = {"forward vs floor": 2.0}
CASES = [
    dequantize("dequantize 64x3x32x32", CIFAR, None, targets=FLOOR),
    dequantize("dequantize 512x3x32x32", BATCH, None, targets=FLOOR),
    dequantize("dequantize+logit 64x3x32x32", CIFAR, 0.05, targets=FLOOR),
    dequantize("dequantize+logit 512x3x32x32", BATCH, 0.05, targets=FLOOR),
    dequantize("dequantize+logit 512x3x32x32 channels_last", BATCH, 0.05, channels_last=True),
    dequantize("dequantize+logit 64x10", (64, 10), 0.05, targets={"forward vs eager": 1.0}),
    quantize("quantize 512x3x32x32", BATCH, None),
    quantize("quantize+logit 512x3x32x32", BATCH, 0.05),
    logit(
        "logit 64x3x32x32",
        CIFAR,
        peers={"normflows": normflows_logit},
        targets=FLOOR | {"forward+backward vs floor": 2.0},
    ),
    logit(
        "logit 512x3x32x32",
        BATCH,
        peers={"normflows": normflows_logit},
        targets=FLOOR | {"forward+backward vs floor": 2.0},
    ),
    logit("logit alpha=0 512x3x32x32", BATCH, 0.0, peers={"nflows": nflows_logit}, extra=True),
    logit("logit 64x10", (64, 10), targets={"forward vs eager": 1.0}),
    logit("bf16 logit 512x3x32x32", BATCH, dtype=torch.bfloat16, extra=True),
]
