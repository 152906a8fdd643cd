"""Transforms of vectors of normflows, as steps of a chain."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._images import Forms
from pyflowkern.interop._layers import ForeignLayer, known_layer, many
from pyflowkern.interop._nflows.linear import lu_matrix
from pyflowkern.interop._normflows.images import CouplingForm
from pyflowkern.interop._normflows.networks import mlp
from pyflowkern.interop._normflows.parts import Awaits, is_named
from pyflowkern.interop._watches import Holds, is_fixed
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.chain_steps import (
    MOST_PLU,
    ActNormStep,
    ElementsStep,
    LinearStep,
    LUStep,
    PermuteStep,
)

__all__ = [
    "AffineCoupling",
    "AffineMatrix",
    "ConstantAffine",
    "Layer",
    "Permute",
    "Shuffle",
    "layer_of",
    "turned_round",
]

Pair = tuple[Tensor, Tensor]


class Layer(ForeignLayer):
    """A transform of normflows, whose ``forward`` goes from latent to data."""

    module: Any

    def __call__(self, x: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run the library's own transform from data to latent."""
        return self._call(self.module.inverse, x, context)

    def inverse(self, z: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run the library's own transform from latent to data."""
        return self._call(self.module, z, context)

    @staticmethod
    def _call(method: Callable[..., Pair], x: Tensor, context: Tensor | None) -> Pair:
        y, log_det = method(x) if context is None else method(x, context=context)
        if isinstance(log_det, Tensor) and not log_det.dim() and isinstance(x, Tensor):
            log_det = log_det.expand(x.shape[0])  # one number for all samples
        return y, log_det


class Permute(Layer):
    """``flows.mixing.Permute`` along the features."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.num_channels))

    def link(self) -> Link | None:
        module, count = self.module, self.features
        link = Link()
        link.watch(module, "mode", "num_channels")
        if module.mode == "swap":
            half = (count + 1) // 2
            link.steps.append(PermuteStep([*range(half, count), *range(half)]))
            return link
        order, back = (module._buffers.get(name) for name in ("inv_perm", "perm"))
        if module.mode != "shuffle" or order is None or back is None:
            return None
        if order[back].tolist() != list(range(count)):
            return None
        link.steps.append(PermuteStep(order.tolist()))
        link.holds += [Holds(module, "inv_perm"), Holds(module, "perm")]
        return link

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data."""
        if (link := self.link()) is None:
            return None
        (step,) = link.steps
        assert isinstance(step, PermuteStep)
        order = step.order
        link.steps = [PermuteStep([order.index(i) for i in range(len(order))])]
        return turned_round(link)


class ConstantAffine(Layer):
    """``flows.ActNorm`` and ``flows.AffineConstFlow`` on vectors: ``z = (x - t) exp(-s)``."""

    def __init__(self, module: Any) -> None:
        shape = module.s.shape
        fits = len(shape) == 2 and shape[0] == 1 and module.batch_dims in ([0], [0, 1])
        super().__init__(module, int(shape[1]) if fits and module.t.shape == shape else 0)

    def link(self) -> Link | None:
        return self._link(lambda s, t: (-s, -t))

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data: ``x = exp(s) (z + t exp(-s))``."""
        return turned_round(self._link(lambda s, t: (s, t * torch.exp(-s))))

    def _link(self, of: Callable[[Tensor, Tensor], Sequence[Tensor]]) -> Link | None:
        module = self.module
        if module.batch_dims not in ([0], [0, 1]):  # the second is of one feature
            return None
        link = Link([ActNormStep()])
        link.watch(module, "batch_dims")
        link.make(module, ("s", "t"), lambda inverse: of(module.s[0], module.t[0]))
        if is_named(module, "flows.normalization.ActNorm"):
            link.waits.append(Awaits(module))
        return link


class AffineMatrix(Layer):
    """``flows.InvertibleAffine``: ``z = x W``, for ``W`` or its factors."""

    def __init__(self, module: Any) -> None:
        super().__init__(module, int(module.num_channels))

    def link(self) -> Link | None:
        return self._link(False)

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data."""
        return turned_round(self._link(True))

    def _link(self, turned: bool) -> Link | None:
        module = self.module
        link = Link([LinearStep()])
        link.watch(module, "use_lu", "num_channels")
        if module.use_lu and not is_fixed(
            link, module, "eye", torch.eye(self.features, device="cpu")
        ):
            return None
        names = ("log_S", "L") if module.use_lu else ("W", "W")
        link.make(module, names, lambda inverse: self._matrix(inverse, turned))
        return link

    def _matrix(self, inverse: bool, turned: bool) -> Sequence[Any]:
        """Return the step's matrix, or with ``inverse`` that of its inverse, and its log-determinant.

        A singular one has none: the library is called then, and says so.
        """
        module, other = self.module, inverse ^ turned
        if module.use_lu:
            factors = (module.P.argmax(1), module.L, module.U, module.log_S, module.sign_S)
            weight, log_abs_det = ops.plu_matrix(*factors, inverse=other), module.log_S.sum()
        elif other:
            w: Any = module.W
            sign, log_abs_det, inverted = ops.slogdet_inverse(w.double())
            if bool(sign == 0):
                return None, None
            weight, log_abs_det = inverted.to(w.dtype), log_abs_det.to(w.dtype)
        else:
            weight, log_abs_det = module.W, torch.linalg.slogdet(module.W)[1]
        return weight.t(), -log_abs_det if turned else log_abs_det


class AffineCoupling(Layer):
    """``flows.AffineCouplingBlock``, on vectors and images."""

    def __init__(self, module: Any) -> None:
        super().__init__(module)
        self._forms = Forms(module, CouplingForm.read)
        form = CouplingForm.read(module)
        if form is not None:
            self.features = self._count(form)

    @staticmethod
    def _count(form: CouplingForm) -> int:
        """Return how many features vectors have; 0 where the network is not known."""
        net = mlp(form.net, Link())
        if net is None:
            return 0
        passing, outputs = net.layers[0].inputs, net.layers[-1].outputs
        return passing + outputs // (1 if form.scale_map.kind == "additive" else 2)

    def link(self) -> Link | None:
        form = CouplingForm.read(self.module)
        net = None if form is None else mlp(form.net, form.link)
        if form is None or net is None:
            return None
        form.link.context_features = 0
        features = [*range(self.features)]
        first = ops.channel_split_sizes(len(features))[0]
        ahead, behind = features[:first], features[first:]
        passing, moved = (behind, ahead) if form.swap else (ahead, behind)
        try:
            step = ElementsStep(_from_data(form.scale_map), moved, passing, net)
        except ValueError:  # which only calls can refuse
            return None
        form.link.steps.append(step)
        return form.link

    def pays(self, x: Tensor) -> bool:
        """Whether an op is faster than the library's few calls."""
        return many(x)

    def by_op(self, x: Tensor, context: Tensor | None, inverse: bool) -> Pair | None:
        """Run the coupling of images."""
        if context is not None:
            return None
        name = "forward" if inverse else "inverse"
        pair: Pair | None = self._forms.run(x, name, inverse)
        return pair


def layer_of(module: torch.nn.Module) -> ForeignLayer:
    """Return the layer that a flow was found to be; one that is always called where there is none."""
    layer = known_layer(module)
    return Layer(module) if layer is None else layer


def _from_data(scale_map: ScaleMap) -> ScaleMap:
    """Return the inverse of ``z = s x + t``: ``(x - t) / s``."""
    if scale_map.kind == "additive":
        return replace(scale_map, shift_gain=-1.0)
    return replace(scale_map, shift_first=True, divide=not scale_map.divide, shift_gain=-1.0)


def turned_round(link: Link | None) -> Link | None:
    """Let a link be of the steps of the other direction."""
    if link is not None:
        link.backwards = not link.backwards
    return link


class Shuffle(Layer):
    """``LULinearPermute``: a permutation, then a matrix in packed triangles."""

    def __init__(self, module: Any) -> None:
        inner = module._modules.get("linear")
        super().__init__(module, 0 if inner is None else int(inner.features))

    def link(self) -> Link | None:
        if (link := self._parts()) is None:
            return None
        linear, order = self.module.linear, self.module.permutation._permutation
        link.steps += [PermuteStep(order.tolist()), LUStep(linear.eps)]
        link.read(linear, "lower_entries", "upper_entries", "unconstrained_upper_diag", "bias")
        return link

    def turned(self) -> Link | None:
        """Return the link of the steps from latent to data: ``U^-1 L^-1 (z - b)``, then the permutation undone."""
        if (link := self._parts()) is None:
            return None
        linear, order = self.module.linear, self.module.permutation._permutation
        link.steps += [ActNormStep(), LinearStep(), PermuteStep(order.argsort().tolist())]
        link.make(
            linear, ("bias", "bias"), lambda inverse: (torch.zeros_like(linear.bias), -linear.bias)
        )
        link.make(linear, ("bias", "bias"), self._matrix)
        return turned_round(link)

    def _parts(self) -> Link | None:
        """Note the parts."""
        module = self.module
        permutation, linear = (module._modules.get(name) for name in ("permutation", "linear"))
        if not is_named(permutation, "flows.mixing._RandomPermutation") or permutation._dim != 1:
            return None
        if not is_named(linear, "flows.mixing._LULinear") or linear.using_cache:
            return None
        if permutation._permutation.numel() != self.features or self.features > MOST_PLU:
            return None
        link = Link()
        link.watch(module)
        link.watch(permutation, "_dim")
        link.watch(linear, "features", "using_cache", "eps")
        link.holds.append(Holds(permutation, "_permutation"))
        return link

    def _matrix(self, inverse: bool) -> Sequence[Tensor]:
        """Return the inverse of ``L U``, or that itself, and minus its log-determinant."""
        matrix, log_abs_det = lu_matrix(self.module.linear, not inverse)
        return matrix, -log_abs_det
