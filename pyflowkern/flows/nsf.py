"""Neural spline flows: couplings or autoregressive layers of splines, on vectors, angles and images."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.distributions import Distribution

from pyflowkern.core.checks import check_choice, check_count
from pyflowkern.flows._arguments import (
    ConditionerFactory,
    check_counts,
    check_flags,
    parse_event,
    parse_shape,
    parse_widths,
    taking_context,
)
from pyflowkern.flows._base import Flow
from pyflowkern.flows._build import (
    check_space,
    feature_order,
    layer_permutation,
    squeeze_levels,
)
from pyflowkern.flows.bases import Uniform
from pyflowkern.nn import (
    MLP,
    Bijection,
    CircularShift,
    ConvNet,
    GlowStep,
    InvertibleLinear,
    MaskedAutoregressive,
    MultiScale,
    PeriodicInput,
    ResidualConvNet,
    ResidualMLP,
    Sequential,
    SplineCoupling,
    channel_mask,
)
from pyflowkern.ops import SplineMap

__all__ = ["NSF"]

#: Default bound of the splines; examples/spline_bound.py measures what it costs and what it spares.
_BOUND = 5.0


class NSF(Flow):
    r"""Neural spline flow: rational-quadratic splines, whose parameters networks compute.

    On vectors there are ``transforms`` layers: couplings of alternating features (RQ-NSF (C)), or
    with ``autoregressive`` layers in which every feature is conditioned on those before it (RQ-NSF
    (AR): better densities, slower samples).  ``mixing`` is what lies between them:

    ============= ============================================================================
    plu           an invertible matrix, which starts as a random permutation; the default for
                  couplings
    permutation   a permutation, folded into the masks: one for each layer, the same in every flow
    none          couplings of even and odd features, autoregressive orders forth and back; the
                  default for autoregressive layers and bounded domains
    ============= ============================================================================

    Splines live in ``[-bound, bound]``: scale the data to about unit variance.  Outside they are the
    identity, so that the share :math:`2 Q(B)` of the latents (0.27% for ``B = 3``) does not move with
    the rest: narrow densities of standardised data come out too wide where the bound is small, and
    with fewer bins to spend where it is large (measured in examples/spline_bound.py).  With ``circular`` the
    data are angles in :math:`[-\pi, \pi)`: circular splines and learned shifts between them, a
    uniform base, and couplings that see an angle's cosine and sine (autoregressive networks see the
    angle itself, and their density may jump where it wraps).  With ``tails="none"`` the data are in
    ``[0, 1]``, and so is the uniform base.

    On images there are ``levels`` of squeeze, ``steps`` times (ActNorm, 1x1 convolution, spline
    coupling), and split, as in Glow.

    Args:
        event_shape: a dimension ``D`` or ``(D,)``, or ``(C, *space)``.  In one dimension couplings are splines whose
            parameters follow from the context alone.
        transforms: number of spline layers (vectors).
        levels: number of levels (images); ``2 ** levels`` must divide each spatial size.
        steps: steps a level (images).
        hidden: width of each residual block of a network (all the same), or of each hidden layer
            without ``residual``; one number stands for two.
        bins: bins of a spline.
        bound: the splines span ``[-bound, bound]``; None for 5, and for :math:`\pi` of angles.
            Weights trained with nflows' or this package's earlier default need ``bound=3.0``.
        tails: ``"linear"``, ``"affine"``, ``"circular"`` or ``"none"``: see
            :class:`~pyflowkern.ops.SplineMap`.
        autoregressive: masked networks in place of couplings.
        circular: the data are angles: ``tails="circular"``.
        mixing: ``"plu"``, ``"permutation"``, ``"none"``, or None for the default above.
        residual: networks of residual blocks.
        gated: the context gates the residual blocks of vectors, too, as Durkan et al. (2019) have it.
        unconditional: splines for the passing features of a coupling, too.
        context_features: size ``K`` of the context ``[N, K]``; 0 for an unconditional flow.
        bits: bits a pixel of uint8 data (see :class:`Flow`); None for real data.
        alpha: keeps pixels from the ends of the logit, for flows with ``bits``.
        spline: the splines in place of the above; its tails count.
        base: the latent's distribution (see :class:`Flow`); None for the standard normal, or the
            uniform one on a bounded domain.
        conditioner: factory ``(in, out) -> module`` for the couplings.
        memory: ``"stored"``, or ``"reversible"`` to make activations again in the backward pass, by the inverses of the
            layers, in place of keeping them: see :class:`~pyflowkern.nn.Sequential`.

    Raises:
        TypeError: for counts that are no ints, flags that are no bools, and a conditioner whose
            networks do not take the context.
        ValueError: for a count below 1, an unknown name, sizes that do not divide, or what does not
            go together (images and angles, say).

    Source: Durkan, Bekasov, Murray and Papamakarios, "Neural Spline Flows" (2019); for angles
    Rezende et al., "Normalizing Flows on Tori and Spheres" (2020).

    Example:
        >>> import torch
        >>> from pyflowkern import flows
        >>> flow = flows.NSF(5, transforms=3, hidden=(32, 32))
        >>> (-flow.log_prob(torch.randn(16, 5)).mean()).backward()
        >>> angles = flows.NSF(2, hidden=(32, 32), circular=True).sample(100)
        >>> bool((angles.abs() <= torch.pi).all())
        True
    """

    def __init__(
        self,
        event_shape: int | Sequence[int],
        *,
        transforms: int = 5,
        levels: int = 3,
        steps: int = 7,
        hidden: int | Sequence[int] = (256, 256),
        bins: int = 8,
        bound: float | None = None,
        tails: str = "linear",
        autoregressive: bool = False,
        circular: bool = False,
        mixing: str | None = None,
        residual: bool = True,
        gated: bool = False,
        unconditional: bool = False,
        context_features: int = 0,
        bits: int | None = None,
        alpha: float = 0.05,
        spline: SplineMap | None = None,
        base: torch.nn.Module | Distribution | None = None,
        conditioner: ConditionerFactory | None = None,
        memory: str = "stored",
    ) -> None:
        check_flags(autoregressive=autoregressive, circular=circular)
        check_flags(residual=residual, gated=gated, unconditional=unconditional)
        widths = parse_widths(hidden)
        shape = parse_shape(event_shape) if autoregressive else parse_event(event_shape)
        transforms, levels, steps = check_counts(transforms=transforms, levels=levels, steps=steps)
        context_features = check_count("context_features", context_features, 0)
        spline = _spline_map(spline, check_count("bins", bins), bound, tails, circular)
        domain = spline.interval if spline.tails in ("circular", "none") else None
        mixing = _check_mixing(mixing, domain, autoregressive)
        _check_fit(shape, bits, autoregressive, domain, unconditional or conditioner is not None)
        _check_gates(gated, residual, len(shape) == 1 and conditioner is None, context_features)
        network: dict[str, Any] = {"residual": residual, "gated": gated}
        network["context_features"] = context_features
        if autoregressive:
            layers = _autoregressive(shape[0], transforms, widths, spline, mixing, network)
            bijection: Bijection = _mixed(layers, shape[0], spline, mixing, memory)
        else:
            conditioner = _conditioner(conditioner, widths, len(shape) - 1, network)
            coupling = partial(SplineCoupling, spline=spline, unconditional=unconditional)
            if len(shape) > 1:
                level = partial(_image_steps, steps, coupling, conditioner)
                bijection = _image_levels(shape, levels, level, widths[0], network, memory)
            else:
                layers = _couplings(shape[0], transforms, conditioner, coupling, spline, mixing)
                bijection = _mixed(layers, shape[0], spline, mixing, memory)
        super().__init__(
            bijection,
            shape,
            base=Uniform(shape[0], *domain) if base is None and domain is not None else base,
            bits=bits,
            alpha=alpha,
            context_features=context_features,
            domain=domain,
            periodic=spline.tails == "circular",
        )


def _spline_map(
    given: SplineMap | None, bins: int, bound: float | None, tails: str, circular: bool
) -> SplineMap:
    if given is not None:
        if not isinstance(given, SplineMap):
            raise TypeError(f"spline must be a SplineMap, got {type(given).__name__}")
        if circular and given.tails != "circular":
            raise ValueError(f"spline must have circular tails for angles, got {given.tails!r}")
        return given
    if circular:
        if tails not in ("linear", "circular"):
            raise ValueError(f"tails must be 'circular' for angles, got {tails!r}")
        tails = "circular"
    if bound is None:
        bound = torch.pi if tails == "circular" else _BOUND
    return SplineMap(bins=bins, bound=bound, tails=tails)  # type: ignore[arg-type]


def _check_fit(
    shape: tuple[int, ...],
    bits: int | None,
    autoregressive: bool,
    domain: tuple[float, float] | None,
    coupled: bool,
) -> None:
    """Raise ValueError for arguments that exclude each other; ``coupled``: some of them are for couplings only."""
    if (autoregressive or domain is not None) and (len(shape) > 1 or bits is not None):
        raise ValueError(
            "autoregressive layers, angles and tails='none' are for real vectors, "
            f"got event_shape {shape if len(shape) > 1 else shape[0]!r} and bits={bits}"
        )
    if autoregressive and coupled:
        raise ValueError(
            "unconditional and conditioner are for couplings, got autoregressive=True"
        )


def _check_gates(gated: bool, residual: bool, known: bool, context_features: int) -> None:
    if gated and not (residual and known and context_features):
        raise ValueError(
            "gated=True needs context_features, residual=True, a vector, and the networks of this flow"
        )


def _check_mixing(
    mixing: str | None, domain: tuple[float, float] | None, autoregressive: bool
) -> str:
    if mixing is None:
        return "plu" if domain is None and not autoregressive else "none"
    check_choice("mixing", mixing, ("plu", "permutation", "none"))
    if mixing == "plu" and domain is not None:
        raise ValueError("mixing must be 'permutation' or 'none' on a bounded domain, got 'plu'")
    return mixing


def _conditioner(
    given: ConditionerFactory | None,
    widths: tuple[int, ...],
    spatial_dims: int,
    network: dict[str, Any],
) -> ConditionerFactory:
    """Return the factory of a coupling's network, of which the user's is asked to take the context."""
    made = _network(widths, spatial_dims, **network) if given is None else given
    return taking_context(made, network["context_features"])


def _network(
    widths: tuple[int, ...],
    spatial_dims: int,
    *,
    residual: bool,
    context_features: int,
    gated: bool = False,
) -> ConditionerFactory:
    """Return the factory of a coupling's network."""
    if not residual and spatial_dims == 0:
        return partial(MLP, hidden=widths, context_features=context_features)
    if len(set(widths)) > 1:
        raise ValueError(f"residual blocks must have one width, got hidden={widths}")
    options: dict[str, Any] = {"hidden": widths[0], "context_features": context_features}
    if spatial_dims == 0:
        options["gated"] = gated
        return partial(ResidualMLP, blocks=len(widths), activate_last=False, **options)
    if not residual:
        return partial(ConvNet, spatial_dims=spatial_dims, **options)
    return partial(ResidualConvNet, blocks=len(widths), spatial_dims=spatial_dims, **options)


def _image_levels(
    shape: tuple[int, ...],
    levels: int,
    level: Callable[[int], list[Bijection]],
    hidden: int,
    network: dict[str, Any],
    memory: str,
) -> MultiScale:
    """Return the levels of an image flow, a network standardising what leaves after each."""
    check_space(shape, levels)
    options: dict[str, Any] = {"hidden": hidden, "spatial_dims": len(shape) - 1}
    prior = partial(ConvNet, context_features=network["context_features"], **options)
    return squeeze_levels(shape, levels, level, prior, memory)


def _image_steps(
    steps: int,
    coupling: partial[SplineCoupling],
    conditioner: ConditionerFactory,
    channels: int,
) -> list[Bijection]:
    layers: list[Bijection] = []
    for _ in range(steps):
        layers += [GlowStep(channels), coupling(channels, conditioner)]
    return layers


def _couplings(
    features: int,
    transforms: int,
    conditioner: ConditionerFactory,
    coupling: partial[SplineCoupling],
    spline: SplineMap,
    mixing: str,
) -> list[Bijection]:
    if spline.tails == "circular":
        conditioner = partial(PeriodicInput, conditioner=conditioner, bound=spline.bound)
    alternate = channel_mask(features, interleaved=True)
    layers: list[Bijection] = []
    for i in range(transforms):
        if (
            mixing == "plu" or features == 1
        ):  # mixes all features: any split will do, and halves are the fastest
            layers.append(coupling(features, conditioner, swap=i % 2 == 1))
            continue
        mask = alternate ^ (i % 2 == 1)
        if mixing == "permutation":
            mask = mask[layer_permutation(features, i)]
        layers.append(coupling(features, conditioner, split=mask))
    return layers


def _autoregressive(
    features: int,
    transforms: int,
    widths: tuple[int, ...],
    spline: SplineMap,
    mixing: str,
    network: dict[str, Any],
) -> list[Bijection]:
    layers: list[Bijection] = []
    order = "random" if mixing == "permutation" else "reverse"
    for i in range(transforms):
        layer = MaskedAutoregressive(
            features,
            widths,
            transform=spline,
            order=feature_order(order, features, i),
            **network,
        )
        layers.append(layer)
    return layers


def _mixed(
    layers: list[Bijection], features: int, spline: SplineMap, mixing: str, memory: str
) -> Sequential:
    """Put a matrix behind each layer where it mixes features, and a learned shift before each layer of angles."""
    mixed: list[Bijection] = []
    for layer in layers:
        if (
            spline.tails == "circular"
        ):  # behind the last layer it would not change the uniform base
            mixed.append(CircularShift(features, bound=spline.bound))
        mixed.append(layer)
        if mixing == "plu":
            mixed.append(InvertibleLinear(features, init="permutation"))
    return Sequential(*mixed, memory=memory)
