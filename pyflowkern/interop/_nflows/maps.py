"""What nflows' transforms do to each feature, as maps of this package."""

from __future__ import annotations

import math
import sys
from typing import Any, NamedTuple

import torch
from torch import Tensor

from pyflowkern.interop._nflows.names import PREFIXES
from pyflowkern.nn.links import Link
from pyflowkern.ops.elements import ElementMap
from pyflowkern.ops.scale_map import ScaleMap
from pyflowkern.ops.spline_map import SplineMap

__all__ = ["Elements", "autoregressive_elements", "coupling_elements", "unconditional_elements"]

_SIGMOID = ScaleMap("sigmoid", offset=2.0, eps=1e-3)
_BELOW_THREE = ScaleMap("softplus", eps=1e-3, max_scale=3.0)
_OF_KIND = {
    "Linear": "linear",
    "Quadratic": "quadratic",
    "Cubic": "cubic",
    "RationalQuadratic": "rational_quadratic",
}


class Elements(NamedTuple):
    """A map of single features.

    Args:
        element: the map.
        layout: how the parameters of all features lie behind each other.
        raw_first: whether an affine map has its raw scale before its shift.
        heights: factor on the raw heights of quadratic splines, which their map does not have.
    """

    element: ElementMap
    layout: str = "feature_major"
    raw_first: bool = False
    heights: float = 1.0

    def factors(self, like: Tensor, features: int) -> Tensor | None:
        """Return what to multiply all parameters of so many features by; None for 1."""
        if self.heights == 1 or not isinstance(self.element, SplineMap):
            return None
        widths, heights, _ = self.element.sizes
        return like.new_tensor(([1.0] * widths + [self.heights] * heights) * features)

    @property
    def bounded(self) -> bool:
        """Whether the library refuses values outside of [0, 1]."""
        return isinstance(self.element, SplineMap) and self.element.tails == "none"

    @property
    def parts(self) -> list[int]:
        """Which of a feature's parameters come first here, by where they lie there."""
        if isinstance(self.element, SplineMap):
            return [*range(self.element.params)]
        return [1, 0] if self.raw_first else [0, 1]


def coupling_elements(module: Any, net: torch.nn.Module, link: Link) -> Elements | None:
    """Return what a coupling does to the features that it moves, after noting it; None for others.

    Args:
        module: the coupling.
        net: its network, by whose width splines scale some of their parameters.
        link: where it is noted.
    """
    name = type(module).__name__
    if name == "AdditiveCouplingTransform":
        return Elements(ScaleMap("additive"), "blocked")
    if name == "AffineCouplingTransform":
        scale = _scale_map(module, link)
        return None if scale is None else Elements(scale, "blocked")
    kind = _OF_KIND.get(name.removeprefix("Piecewise").removesuffix("CouplingTransform"))
    if kind is None:
        return None
    names = ("hidden_features", "hidden_channels")[: 2 if kind == "rational_quadratic" else 1]
    width = 1.0 if kind == "linear" else _width(net, names, link)
    known = None if width is None else _spline(module, kind, width, link)
    if known is None or width is None or kind != "quadratic":
        return known
    return known._replace(heights=1 / width)


def autoregressive_elements(module: Any, net: torch.nn.Module, link: Link) -> Elements | None:
    """Return what an autoregressive transform does to each feature, after noting it; None for others.

    Args:
        module: the transform.
        net: its network, by whose width splines scale some of their parameters.
        link: where it is noted.
    """
    name = type(module).__name__
    if name == "MaskedAffineAutoregressiveTransform":
        scale = _masked_scale_map(module, link)
        return None if scale is None else Elements(scale, raw_first=True)
    kind = _OF_KIND.get(
        name.removeprefix("MaskedPiecewise").removesuffix("AutoregressiveTransform")
    )
    if kind is None:
        return None
    width = 1.0 if kind == "linear" else _width(net, ("hidden_features",), link)
    return None if width is None else _spline(module, kind, width, link)


def unconditional_elements(module: Any, link: Link) -> Elements | None:
    """Return the spline of a transform whose parameters are the same for all samples, after noting it."""
    name = type(module).__name__
    kind = _OF_KIND.get(name.removeprefix("Piecewise").removesuffix("CDF"))
    return None if kind is None else _spline(module, kind, 1.0, link)


def _spline(module: Any, kind: str, width: float, link: Link) -> Elements | None:
    attributes = module.__dict__
    names = (
        "num_bins",
        "tails",
        "tail_bound",
        "min_bin_width",
        "min_bin_height",
        "min_derivative",
    )
    known = [name for name in names if name in attributes]
    link.watch(module, *known)
    tails = {None: "none", "linear": "linear"}.get(attributes.get("tails"))
    if tails is None:
        return None
    bins = attributes.get("num_bins")
    if bins is None:
        first = "unnormalized_pdf" if kind == "linear" else "unnormalized_widths"
        bins = module._parameters[first].shape[-1]
    least = 0.0 if kind == "linear" else 1e-3
    options: dict[str, Any] = {name: float(attributes.get(name, least)) for name in names[3:5]}
    if kind == "rational_quadratic":
        options["min_derivative"] = float(attributes.get("min_derivative", 1e-3))
    if kind == "quadratic":
        options["edge"] = 0.25  # half of what would make the density at the ends 1
    bound = float(attributes.get("tail_bound", 1.0))
    try:
        spline = SplineMap(
            kind,  # type: ignore[arg-type]
            bins,
            bound,
            tails,  # type: ignore[arg-type]
            scale=1 / width,
            **options,
        )
    except (TypeError, ValueError):  # which only calls refuse
        return None
    return Elements(spline)


def _width(net: torch.nn.Module, names: tuple[str, ...], link: Link) -> float | None:
    """Return the number by which splines divide raw widths and heights; None for one that may change unseen."""
    for name in names:
        if hasattr(net, name):
            width = net.__dict__.get(name)
            if not isinstance(width, int) or width < 1:
                return None
            link.watch(net, name)
            return math.sqrt(width)
        link.absent.append((net, name))
    return 1.0


def _scale_map(module: Any, link: Link) -> ScaleMap | None:
    link.watch(module)
    if "scale_activation" not in module.__dict__:  # nflows 0.14
        if hasattr(module, "scale_activation"):
            return None
        link.absent.append((module, "scale_activation"))
        return _SIGMOID
    link.watch(module, "scale_activation")
    function, cls = module.scale_activation, type(module)
    if function is getattr(cls, "DEFAULT_SCALE_ACTIVATION", None):
        return _SIGMOID
    if function is getattr(cls, "GENERAL_SCALE_ACTIVATION", None):
        return _BELOW_THREE
    return _glasflow_scale_map(function)


def _glasflow_scale_map(function: Any) -> ScaleMap | None:
    """Return the map of a function that ``glasflow.transforms.utils`` gives; None for others."""
    where = "glasflow.transforms.utils"
    known = getattr(sys.modules.get(where), "SCALE_ACTIVATIONS", {})
    name = next((key for key, value in known.items() if value is function), "")
    if name in ("nflows", "nflows_general", "wide"):
        return _SIGMOID if name == "nflows" else _BELOW_THREE
    if name.startswith("log"):
        return _log_scale(float(name[3:]))
    is_made = getattr(function, "__qualname__", "") == "get_scale_activation.<locals>.<lambda>"
    if is_made and function.__module__ == where and len(function.__closure__ or ()) == 1:
        return _log_scale(float(function.__closure__[0].cell_contents))
    return None


def _log_scale(most: float) -> ScaleMap:
    """Return ``exp(most tanh(u / 2))``."""
    return ScaleMap("tanh", clamp=most, gain=most / 2)


def _masked_scale_map(module: Any, link: Link) -> ScaleMap | None:
    link.watch(module, "_epsilon", "features")
    eps = float(module._epsilon)
    if "scale_activation" in module.__dict__:  # glasflow's copy
        link.watch(module, "scale_activation")
        function = module.scale_activation
        place = "transforms.autoregressive", f"{type(module).__name__}.__init__.<locals>.<lambda>"
        found = getattr(function, "__module__", ""), getattr(function, "__qualname__", "")
        if found not in [(f"{prefix}.{place[0]}", place[1]) for prefix in PREFIXES]:
            return None
        eps = float(function.__closure__[0].cell_contents._epsilon)
    else:
        link.absent.append((module, "scale_activation"))
    return ScaleMap("softplus", eps=eps)
