"""Transforms of nflows that have no network, as steps of a chain."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern.core.structure import Structure
from pyflowkern.interop._images import served_samples
from pyflowkern.interop._layers import ForeignLayer, layer_of
from pyflowkern.interop._nflows.names import is_named
from pyflowkern.interop._watches import Holds, InTraining
from pyflowkern.nn.links import Link, hooked
from pyflowkern.ops import actnorm, invertible_linear, plu_matrix, slogdet_inverse
from pyflowkern.ops.chain_steps import ActNormStep, LinearStep, LUStep, PermuteStep

__all__ = [
    "ActNorm",
    "Affine",
    "BatchNorm",
    "Inverse",
    "LULinear",
    "Linear",
    "OneByOneConvolution",
    "Permutation",
    "lu_matrix",
]

_PERMUTATIONS = [
    f"transforms.permutations.{name}"
    for name in ("Permutation", "RandomPermutation", "ReversePermutation")
]
_HOUSEHOLDER = "transforms.orthogonal.HouseholderSequence"


class Permutation(ForeignLayer):
    """``transforms.permutations.Permutation`` along the features."""

    module: Any

    def __init__(self, module: torch.nn.Module) -> None:
        super().__init__(module, module._permutation.numel())  # type: ignore[operator]

    def link(self) -> Link | None:
        return self._link(False)

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data."""
        return _backwards(self._link(True))

    def _link(self, turned: bool) -> Link | None:
        index = self.module._buffers["_permutation"]
        if index is None or self.module._dim != 1:
            return None
        order = (index.argsort() if turned else index).tolist()
        link = Link([PermuteStep(order)])
        link.watch(self.module, "_dim")
        link.holds.append(Holds(self.module, "_permutation"))
        return link


class LULinear(ForeignLayer):
    """``transforms.lu.LULinear``: ``z = L U x + b`` in packed triangles."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.features))

    def link(self) -> Link | None:
        module = self.module
        link = Link([LUStep(float(module.eps))])
        link.watch(module, "features", "eps")
        link.read(module, "lower_entries", "upper_entries", "unconstrained_upper_diag", "bias")
        return link


class OneByOneConvolution(ForeignLayer):
    """``transforms.conv.OneByOneConvolution``: ``z = L U P x + b`` at each pixel of an image."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.features))
        self.chained = False

    def by_op(self, x: Any, context: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Mix the channels by one op."""
        module, size = self.module, self.features
        permutation = module.permutation
        if not served_samples(x) or x.dim() != 4 or x.shape[1] != size or hooked(permutation):
            return None
        if not is_named(permutation, *_PERMUTATIONS) or permutation._dim != 1:
            return None
        if "forward" in permutation.__dict__ or "inverse" in permutation.__dict__:
            return None
        matrix, log_abs_det = lu_matrix(module, inverse)
        if matrix.dtype != x.dtype or matrix.device != x.device:
            return None
        order = permutation._permutation.argsort()
        matrix = matrix[order] if inverse else matrix[:, order]
        return invertible_linear(x, matrix, log_abs_det, module.bias, inverse=inverse)


def lu_matrix(module: Any, inverse: bool) -> tuple[Tensor, Tensor]:
    """Return ``L U`` of an LULinear, or its inverse, and the log-determinant of ``L U``."""
    raw = module.unconstrained_upper_diag
    size, log_diag = len(raw), (functional.softplus(raw) + module.eps).log()
    order, *places = (kept.on(raw.device) for kept in _places(size))
    lower, upper = (
        entries.new_zeros(size * size).index_put((at,), entries).view(size, size)
        for entries, at in zip((module.lower_entries, module.upper_entries), places, strict=True)
    )
    matrix = plu_matrix(order, lower, upper, log_diag, torch.ones_like(raw), inverse=inverse)
    return matrix, log_diag.sum()


@lru_cache(maxsize=64)
def _places(size: int) -> tuple[Structure, Structure, Structure]:
    """Return the order of rows, and where the entries of both triangles lie in a matrix."""
    with torch.inference_mode(False), torch.device("cpu"):
        rows = torch.arange(size)
        lower, upper = torch.tril_indices(size, size, -1), torch.triu_indices(size, size, 1)
        return (Structure(rows), *(Structure(at[0] * size + at[1]) for at in (lower, upper)))  # type: ignore[return-value]


class Linear(ForeignLayer):
    """``transforms.linear.Linear`` of another kind: its matrix is made at each call, by the library's own code."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.features))

    def link(self) -> Link | None:
        module = self.module
        if not all(is_named(part, _HOUSEHOLDER) for part in module.children()):
            return None
        link = Link([LinearStep(), ActNormStep()])
        link.watch(module, "features")
        for part in module.children():
            link.watch(part)
        link.make(module, ["bias"] * 4, self._tensors)
        return link

    def _tensors(self, inverse: bool) -> Sequence[Any]:
        module, bias = self.module, self.module.bias
        if module.using_cache and not module.training:
            module._check_forward_cache()
            weight, log_abs_det = module.cache.weight, module.cache.logabsdet
        else:
            weight, log_abs_det = module.weight_and_logabsdet()
        if inverse:
            sign, _, weight = slogdet_inverse(weight)
            if bool(sign == 0):  # the library says that it is singular
                return [None] * 4
        return weight, log_abs_det, torch.zeros_like(bias), bias


class _Scaling(ForeignLayer):
    """A scale and a shift of each feature, as the step ActNorm has them; subclasses make its tensors."""

    module: Any
    #: As many tensors of the module as the step has.
    names: tuple[str, str]

    def link(self) -> Link | None:
        return self._link(self._tensors)

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data."""
        return _backwards(self._link(self._turned_tensors))

    def _link(self, make: Any) -> Link:
        link = Link([ActNormStep()])
        link.watch(self.module)
        link.make(self.module, self.names, make)
        return link

    def _tensors(self, inverse: bool) -> Sequence[Any]:
        """Return the logarithm of the scale, and what is added before it."""
        raise NotImplementedError

    def _turned_tensors(self, inverse: bool) -> Sequence[Any]:
        """Return those of the map from latent to data."""
        raise NotImplementedError


class ActNorm(_Scaling):
    """``transforms.normalization.ActNorm``: ``z = exp(s) x + t``."""

    names = ("log_scale", "shift")

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.log_scale.numel())

    def _link(self, make: Any) -> Link:
        link = super()._link(make)
        link.waits.append(Awaits(self.module))
        return link

    def by_op(self, x: Any, context: Any, inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Normalize images by one op."""
        norm = self.module
        if not served_samples(x) or x.dim() != 4 or x.shape[1] != self.features or Awaits(norm)():
            return None
        return actnorm(x, *self._tensors(inverse), inverse=inverse)

    def _tensors(self, inverse: bool) -> Sequence[Any]:
        log_scale = self.module.log_scale
        return log_scale, self.module.shift * torch.exp(-log_scale)

    def _turned_tensors(self, inverse: bool) -> Sequence[Any]:
        return -self.module.log_scale, -self.module.shift


class Awaits:
    """Whether an ActNorm waits for its first batch, by which it initialises itself in training."""

    def __init__(self, norm: torch.nn.Module) -> None:
        self._norm = norm

    def __call__(self) -> bool:
        return self._norm.training and not self._norm._buffers["initialized"]


class BatchNorm(_Scaling):
    """``transforms.normalization.BatchNorm`` with running statistics."""

    names = ("unconstrained_weight", "bias")

    def __init__(self, module: Any) -> None:
        super().__init__(module, module.bias.numel())

    def _link(self, make: Any) -> Link:
        link = super()._link(make)
        link.facts.append((self.module, ("eps",)))
        link.waits.append(InTraining(self.module))
        return link

    def _log_scale(self) -> Tensor:
        norm = self.module
        return torch.log(norm.weight) - 0.5 * torch.log(norm.running_var + norm.eps)

    def _tensors(self, inverse: bool) -> Sequence[Any]:
        log_scale = self._log_scale()
        return log_scale, self.module.bias * torch.exp(-log_scale) - self.module.running_mean

    def _turned_tensors(self, inverse: bool) -> Sequence[Any]:
        log_scale = self._log_scale()
        return -log_scale, self.module.running_mean * torch.exp(log_scale) - self.module.bias


class Affine(_Scaling):
    """``transforms.standard.PointwiseAffineTransform``: ``z = x * scale + shift``, neither of them trained.

    The library is called where a scale is negative, which the step does not have.
    """

    names = ("_scale", "_shift")

    def __init__(self, module: Any) -> None:
        sizes = {t.numel() for t in (module._scale, module._shift)} - {1}
        shapes = {t.dim() for t in (module._scale, module._shift)}
        fits = len(sizes) <= 1 and shapes <= {0, 1}
        self._any = fits and not sizes
        super().__init__(module, sizes.pop() if fits and sizes else 0)

    def fitted(self, features: int) -> Affine:
        """Return the layer of as many features as its neighbours have, if it is made of single numbers."""
        if not self._any:
            return self
        other = copy.copy(self)  # it may have other neighbours elsewhere
        other.features = features
        return other

    def link(self) -> Link | None:
        return super().link() if self._is_positive() else None

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data."""
        return super().turned() if self._is_positive() else None

    def _is_positive(self) -> bool:
        return bool((self.module._scale > 0).all())

    def _link(self, make: Any) -> Link:
        link = super()._link(make)
        link.holds.append(Holds(self.module, "_scale"))
        return link

    def _tensors(self, inverse: bool) -> Sequence[Any]:
        scale, shift = self.module._scale, self.module._shift
        return self._of_each(torch.log(scale), shift / scale)

    def _turned_tensors(self, inverse: bool) -> Sequence[Any]:
        return self._of_each(-torch.log(self.module._scale), -self.module._shift)

    def _of_each(self, *numbers: Tensor) -> Sequence[Any]:
        return [t.expand(self.features).contiguous() for t in numbers]


class Inverse(ForeignLayer):
    """``transforms.base.InverseTransform``."""

    module: Any

    def __init__(self, module: Any) -> None:
        super().__init__(module, layer_of(module._transform).features)

    def link(self) -> Link | None:
        return self._of(False)

    def turned(self) -> Link | None:
        """Return the link of the steps in the other direction."""
        return self._of(True)

    def _of(self, turned: bool) -> Link | None:
        inner = layer_of(self.module._transform)  # another one may be there now
        if inner.features != self.features:
            return None
        link = inner.turned() if turned else inner._chain_link()
        if link is not None:
            link.backwards = not link.backwards
            link.turned = self.turned
            link.watch(self.module)
        return link


def _backwards(link: Link | None) -> Link | None:
    if link is not None:
        link.backwards = True
    return link
