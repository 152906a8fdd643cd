"""Sampling from autoregressive flows (stacks of masked layers), against their density and other libraries."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor

import pyflowkern
from bench._case import Case, Inputs, Lazy, Provider, random_inputs
from pyflowkern import nn
from pyflowkern.ops import SplineMap

TRANSFORMS, BINS = 5, 8
SPREAD = 0.02  # standard deviation of noise added to the initial weights, so that no layer is the identity


@cache
def ours(
    features: int, hidden: tuple[int, ...], spline: bool, transforms: int, device: torch.device
) -> nn.Sequential:
    """Return a stack whose layers alternate between ascending and descending order."""
    torch.manual_seed(0)
    layers = [
        nn.MaskedAutoregressive(
            features,
            hidden,
            transform=SplineMap(bins=BINS, bound=5.0) if spline else "affine",
            order=range(features) if i % 2 == 0 else range(features)[::-1],
        )
        for i in range(transforms)
    ]
    model = nn.Sequential(*layers).to(device)
    with torch.no_grad():
        for p in model.parameters():
            p.add_(SPREAD * torch.randn_like(p))
    return model


# --- peers: stacks of the same shape, with weights of their own ----------------------------------


def zuko_sampler(features: int, hidden: tuple[int, ...], spline: bool, transforms: int) -> Any:
    def build(inputs: Inputs) -> Provider:
        import zuko

        options = {"transforms": transforms, "hidden_features": hidden}
        kind = partial(zuko.flows.NSF, bins=BINS) if spline else zuko.flows.MAF
        flow = kind(features, **options).to(inputs["z"].device)

        @torch.no_grad()
        def run(z: Tensor) -> Tensor:
            found: Tensor = flow().transform.inv(z)
            return found

        return run

    return build


def nflows_sampler(features: int, hidden: tuple[int, ...], transforms: int) -> Any:
    """Return the sampler of a stack in nflows, whose networks have the same width in all hidden layers."""

    def build(inputs: Inputs) -> Provider:
        from nflows.transforms import (
            CompositeTransform,
            MaskedAffineAutoregressiveTransform,
            ReversePermutation,
        )

        layers: list[Any] = []
        for _ in range(transforms):
            layers += [
                ReversePermutation(features),
                MaskedAffineAutoregressiveTransform(
                    features, hidden[0], num_blocks=len(hidden) - 1, use_residual_blocks=False
                ),
            ]
        flow = CompositeTransform(layers).to(inputs["z"].device)

        @torch.no_grad()
        def run(z: Tensor) -> Any:
            return flow.inverse(z)

        return run

    return build


# --- cases ---------------------------------------------------------------------------------------


def sampling(
    name: str,
    samples: int,
    features: int,
    hidden: tuple[int, ...],
    *,
    spline: bool = False,
    transforms: int = TRANSFORMS,
    peers: bool = True,
    **case: Any,
) -> Case:
    """Return the case of sampling from a stack; ``log_prob`` is the density of the same stack."""

    def stack(inputs: Inputs) -> nn.Sequential:
        return ours(features, hidden, spline, transforms, inputs["z"].device)

    def of(direction: str, reference: bool = False) -> Callable[[Inputs], Provider]:
        def build(inputs: Inputs) -> Provider:
            model = stack(inputs)

            @torch.no_grad()
            def run(z: Tensor) -> Any:
                with pyflowkern.use_reference(reference):
                    return model.inverse(z) if direction == "inverse" else model(z)

            return run

        return build

    providers: dict[str, Provider | Lazy] = {
        "eager": Lazy(of("inverse", reference=True)),
        "ours": Lazy(of("inverse")),
        "log_prob": Lazy(of("forward"), comparable=False),
    }
    if peers:
        zuko = zuko_sampler(features, hidden, spline, transforms)
        providers["zuko"] = Lazy(zuko, comparable=False)
    if peers and not spline:
        nflows = nflows_sampler(features, hidden, transforms)
        providers["nflows"] = Lazy(nflows, comparable=False)
    return Case(
        name=name,
        make_inputs=random_inputs(z=(samples, features)),
        providers=providers,
        passes=("call",),
        constants=("z",),
        compiles=False,
        **case,
    )


def gradient(samples: int, features: int, hidden: tuple[int, ...]) -> Case:
    """Return the case of samples with gradients of all parameters, as variational inference needs them."""

    def of(reference: bool) -> Callable[[Inputs], Provider]:
        def build(inputs: Inputs) -> Provider:
            model = ours(features, hidden, False, TRANSFORMS, inputs["z"].device)

            def run(z: Tensor) -> list[Tensor]:
                model.zero_grad(set_to_none=True)
                with pyflowkern.use_reference(reference):
                    x, log_det = model.inverse(z)
                loss = 0.5 * (x**2).sum() - log_det.sum()
                loss.backward()
                first = next(model.parameters()).grad
                return [loss.detach(), z if first is None else first]

            return run

        return build

    return Case(
        name=f"sample and gradient D={features} {TRANSFORMS} x {hidden}, {samples} samples",
        make_inputs=random_inputs(z=(samples, features)),
        providers={"eager": Lazy(of(True)), "ours": Lazy(of(False))},
        passes=("call",),
        constants=("z",),
        compiles=False,
        extra=True,
    )


CASES = [
    sampling(
        "MAF D=43 5 x (512, 512), 1000 samples",
        1000,
        43,
        (512, 512),
        targets={"call vs log_prob": 0.4, "call vs zuko": 15.0},
    ),
    sampling(
        "NSF D=43 5 x (256, 256) K=8, 1000 samples",
        1000,
        43,
        (256, 256),
        spline=True,
        targets={"call vs zuko": 25.0},
    ),
    sampling("MAF D=43 5 x (512, 512), 1 sample", 1, 43, (512, 512), extra=True),
    gradient(256, 43, (128, 128)),
    sampling(
        "MAF D=784 one layer (1024, 1024), 1024 samples",
        1024,
        784,
        (1024, 1024),
        transforms=1,
        peers=False,
        targets={"call vs eager": 50.0},  # eager: a pass for each feature
        devices=("cuda",),
    ),
    *(
        sampling(
            f"one layer D={d} (512, 512), 1000 samples",
            1000,
            d,
            (512, 512),
            transforms=1,
            peers=False,
            extra=True,
        )
        for d in (8, 16, 32, 64, 128, 256)
    ),
]
