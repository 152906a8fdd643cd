"""Glow on 32x32 images: a training step, log-density and samples."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import flows

SHAPE, LEVELS, STEPS, HIDDEN = (3, 32, 32), 3, 8, 64
LogProb = Callable[[Tensor], Tensor]


@cache
def ours(device: torch.device) -> flows.Glow:
    return _ready(flows.Glow(SHAPE, levels=LEVELS, steps=STEPS, hidden=HIDDEN), device)


@cache
def normflows_glow(device: torch.device) -> Any:
    """Return a Glow of normflows with the same levels, steps and widths; its scale map is a sigmoid, ours tanh."""
    import normflows as nf

    channels, size = SHAPE[0], SHAPE[1]
    bases, levels, merges = [], [], []
    for i in range(LEVELS):
        width = channels * 2 ** (LEVELS + 1 - i)
        blocks = [nf.flows.GlowBlock(width, HIDDEN, scale_map="sigmoid") for _ in range(STEPS)]
        levels.append([*blocks, nf.flows.Squeeze()])
        latent = (width if i == 0 else width // 2, *[size // 2 ** (LEVELS - i)] * 2)
        bases.append(nf.distributions.DiagGaussian(latent))
        if i > 0:
            merges.append(nf.flows.Merge())
    return _ready(nf.MultiscaleFlow(bases, levels, merges, class_cond=False), device)


def _ready(model: Any, device: torch.device) -> Any:
    """Initialise from data, then move the weights away from zero, which would hide mistakes."""
    torch.manual_seed(0)
    model = model.to(device)
    with torch.no_grad(), pyflowkern.use_reference():
        _log_prob(model)(torch.randn(32, *SHAPE, device=device))
        for p in model.parameters():
            p.add_(0.01 * torch.randn_like(p))
    return model


def _log_prob(model: Any) -> LogProb:
    return model.log_prob if isinstance(model, flows.Flow) else partial(model.log_prob, y=None)


# --- what is timed, for any model ----------------------------------------------------------------


def train_step(model: Any, x: Tensor) -> list[Tensor]:
    """Run a training step without the optimizer, which would be the same for all."""
    model.zero_grad(set_to_none=True)
    loss = -_log_prob(model)(x).mean()
    loss.backward()
    return [loss.detach(), next(model.parameters()).grad]


@torch.no_grad()
def log_prob(model: Any, x: Tensor) -> Tensor:
    return _log_prob(model)(x)


@torch.no_grad()
def sample(model: Any, x: Tensor) -> Tensor:
    torch.manual_seed(0)
    out = model.sample(len(x))
    return out if isinstance(out, Tensor) else out[0]


def timed(work: Callable[..., Any]) -> dict[str, Lazy]:
    """Return the providers of one kind of work."""

    def reference(inputs: Inputs) -> Provider:
        model = ours(inputs["x"].device)

        def run(x: Tensor) -> Any:
            with pyflowkern.use_reference():
                return work(model, x)

        return run

    return {
        "eager": Lazy(reference),
        "ours": Lazy(lambda inputs: partial(work, ours(inputs["x"].device))),
        "normflows": Lazy(
            lambda inputs: partial(work, normflows_glow(inputs["x"].device)), comparable=False
        ),
    }


CASES = [
    Case(
        name=f"{name} 32x3x32x32, L={LEVELS} K={STEPS} hidden {HIDDEN}",
        make_inputs=random_inputs(x=(32, *SHAPE)),
        providers=timed(work),
        passes=("call",),
        constants=("x",),
        compiles=False,
    )
    for name, work in (("training step", train_step), ("log_prob", log_prob), ("sample", sample))
]
