"""The invertible linear map of channels, alone (1x1 convolution) and after ActNorm (a Glow step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes
from pyflowkern import ops


def conv2d_step(
    x: Tensor,
    log_scale: Tensor,
    bias: Tensor,
    weight: Tensor,
    log_abs_det: Tensor,
    inverse: bool = False,
) -> Outputs:
    """The Glow step as most implementations write it: ActNorm, then conv2d with a 1x1 kernel."""
    s, b = log_scale.view(1, -1, 1, 1), bias.view(1, -1, 1, 1)
    kernel = weight[:, :, None, None]
    y = F.conv2d(x, kernel) * torch.exp(-s) - b if inverse else F.conv2d((x + b) * s.exp(), kernel)
    log_det = x[0, 0].numel() * (log_scale.sum() + log_abs_det)
    return y, (-log_det if inverse else log_det).expand(len(x))


def normflows_conv(inputs: Inputs) -> Provider:
    """Return normflows' layer with the parameters of the first input set; it computes the determinant in every call."""
    from normflows.flows import Invertible1x1Conv

    layer = Invertible1x1Conv(inputs["x"].shape[1], use_lu=False).to(inputs["x"].device)
    layer.W.data.copy_(torch.linalg.inv(inputs["weight"]))  # its forward is from latent to data

    def run(x: Tensor, inverse: bool = False, **_: Tensor) -> Any:
        y, log_det = layer(x) if inverse else layer.inverse(x)
        return y, log_det.expand(len(x))

    return run


# --- cases ---------------------------------------------------------------------------------------


def make_inputs(
    shape: Sequence[int], glow: bool, channels_last: bool = False
) -> Callable[..., Inputs]:
    """Return a ``make_inputs`` of data and a well-conditioned matrix.

    The inverse pass uses the same matrix in place of its inverse, which costs the same.
    """

    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        x, c = normal(*shape), shape[1]
        x = x.contiguous(memory_format=torch.channels_last) if channels_last else x
        weight = torch.eye(c, device=device).to(dtype) + 0.3 / c**0.5 * normal(c, c)
        log_abs_det = torch.linalg.slogdet(weight.double())[1].to(dtype)
        if glow:
            scale, bias = normal(c) * 0.1, normal(c)
            return {
                "x": x,
                "log_scale": scale,
                "bias": bias,
                "weight": weight,
                "log_abs_det": log_abs_det,
            }
        return {"x": x, "weight": weight, "log_abs_det": log_abs_det}

    return make


def _flops(inputs: Inputs) -> float:
    return 2.0 * inputs["x"].numel() * inputs["x"].shape[1]


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read x and the output gradients, write the gradient of x."""
    return 2 * nbytes(inputs["x"]) + nbytes(*outputs)


def glow_step(name: str, shape: Sequence[int], channels_last: bool = False, **case: Any) -> Case:
    providers: dict[str, Provider | Lazy] = {
        "eager": ops.glow_step_reference,
        "ours": ops.glow_step,
    }
    if len(shape) == 4:
        providers["conv2d"] = conv2d_step
    return Case(
        name=name,
        make_inputs=make_inputs(shape, True, channels_last),
        providers=providers,
        backward_bytes=_backward_bytes,
        flops=_flops,
        **case,
    )


def linear(name: str, shape: Sequence[int], **case: Any) -> Case:
    providers: dict[str, Provider | Lazy] = {
        "eager": ops.invertible_linear_reference,
        "ours": ops.invertible_linear,
    }
    if len(shape) == 4:
        providers["normflows"] = Lazy(normflows_conv)
    return Case(
        name=name,
        make_inputs=make_inputs(shape, False),
        providers=providers,
        backward_bytes=_backward_bytes,
        flops=_flops,
        **case,
    )


IMAGE = (64, 48, 16, 16)
CASES = [
    glow_step(
        "glow step 64x48x16x16",
        IMAGE,
        targets={"forward+backward vs eager": 2.0, "forward+backward vs compile": 1.2},
    ),
    glow_step("glow step 64x12x32x32", (64, 12, 32, 32)),
    glow_step("glow step 64x48x16x16 channels_last", IMAGE, channels_last=True),
    glow_step("glow step 64x10", (64, 10)),
    linear("linear 64x48x16x16", IMAGE),
    linear("linear 64x10", (64, 10)),
    linear("linear 4096x32", (4096, 32)),
    glow_step("glow step 64x96x8x8", (64, 96, 8, 8), extra=True),
    glow_step("bf16 glow step 64x48x16x16", IMAGE, dtype=torch.bfloat16, extra=True),
]
