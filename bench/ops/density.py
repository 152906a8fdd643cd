"""The log-density of a diagonal normal distribution: standard, learned and conditional."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes, random_inputs
from pyflowkern import ops

# --- peers ---------------------------------------------------------------------------------------


def torch_normal(
    z: Tensor, mean: Tensor | None = None, log_std: Tensor | None = None, **extra: Tensor
) -> Tensor:
    """Compute the same by torch.distributions, as many flow libraries do."""
    loc = torch.zeros((), device=z.device, dtype=z.dtype) if mean is None else mean
    scale = torch.ones((), device=z.device, dtype=z.dtype) if log_std is None else log_std.exp()
    value = torch.distributions.Normal(loc, scale, validate_args=False).log_prob(z)
    return value.flatten(1).sum(1) + extra.get("log_det", 0.0)


def nflows_standard(inputs: Inputs) -> Provider:
    from nflows.distributions import StandardNormal

    base = StandardNormal(inputs["z"].shape[1:]).to(inputs["z"].device)
    return lambda z, log_det: base.log_prob(z) + log_det


def nflows_conditional(inputs: Inputs) -> Provider:
    from nflows.distributions import ConditionalDiagonalNormal

    base = ConditionalDiagonalNormal(inputs["z"].shape[1:])

    def run(z: Tensor, mean: Tensor, log_std: Tensor, log_det: Tensor) -> Tensor:
        context = torch.cat((mean.flatten(1), log_std.flatten(1)), 1)
        return base.log_prob(z, context=context) + log_det

    return run


# --- cases ---------------------------------------------------------------------------------------


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read the inputs and the output gradient, write a gradient of every input."""
    return 2 * nbytes(*inputs.values()) + nbytes(*outputs)


def normal(
    name: str,
    shape: Sequence[int],
    parameters: str = "none",
    peers: dict[str, Callable[[Inputs], Provider]] | None = None,
    **case: Any,
) -> Case:
    """Return a case without parameters, with parameters of the ``event``, or with parameters of every ``element``."""
    of = {"none": None, "event": shape[1:], "element": shape}[parameters]
    extra = {} if of is None else {"mean": of, "log_std": of}
    return Case(
        name=name,
        make_inputs=random_inputs(z=shape, **extra, log_det=shape[:1]),
        providers={
            "eager": ops.normal_log_prob_reference,
            "ours": ops.normal_log_prob,
            "torch.distributions": torch_normal,
            **{peer: Lazy(build) for peer, build in (peers or {}).items()},
        },
        passes=("forward", "forward+backward"),
        backward_bytes=_backward_bytes,
        **case,
    )


CIFAR, BATCH = (64, 3, 32, 32), (512, 3, 32, 32)
FLOOR = {"forward vs floor": 2.0, "forward+backward vs floor": 2.0}
SMALL = {"forward vs eager": 1.0, "forward+backward vs eager": 1.0}
CASES = [
    normal("standard 64x3x32x32", CIFAR, peers={"nflows": nflows_standard}, targets=FLOOR),
    normal("standard 512x3x32x32", BATCH, peers={"nflows": nflows_standard}, targets=FLOOR),
    normal("learned 64x3x32x32", CIFAR, "event", targets=FLOOR),
    normal("learned 512x3x32x32", BATCH, "event", targets=FLOOR),
    normal(
        "conditional 64x3x32x32",
        CIFAR,
        "element",
        peers={"nflows": nflows_conditional},
        targets=FLOOR,
    ),
    normal(
        "conditional 512x3x32x32",
        BATCH,
        "element",
        peers={"nflows": nflows_conditional},
        targets=FLOOR,
    ),
    normal("standard 64x10", (64, 10), targets=SMALL),
    normal("learned 64x10", (64, 10), "event", targets=SMALL),
    normal("learned 65536x8", (65536, 8), "event"),
    normal("bf16 conditional 512x3x32x32", BATCH, "element", dtype=torch.bfloat16, extra=True),
]
