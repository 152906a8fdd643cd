"""zuko's lazy transforms as layers of runs that one op replaces."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from pyflowkern.interop._layers import ForeignLayer
from pyflowkern.interop._watches import Holds
from pyflowkern.interop._zuko.elements import Univariate, name_of, univariate_of
from pyflowkern.interop._zuko.networks import dense_network, is_of, masked_network
from pyflowkern.interop._zuko.unconditional import UNCONDITIONAL
from pyflowkern.nn.chain import served
from pyflowkern.nn.links import Link, hooked
from pyflowkern.ops.chain_network import ChainNetwork
from pyflowkern.ops.chain_steps import ElementsStep
from pyflowkern.ops.spline_map import SplineMap

__all__ = [
    "Called",
    "Conditional",
    "Coupling",
    "ElementWise",
    "Inverse",
    "MaskedAutoregressive",
    "Unconditional",
    "sizes_of",
]

Pair = tuple[Tensor, Tensor]
_ACTIVATIONS = "torch.nn.modules.activation"


class Called(ForeignLayer):
    """A lazy transform of vectors, which is called."""

    #: Whether zuko reads its parameters when the transform is made, not when it is used.
    early = False
    module: Any

    def __call__(self, x: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run zuko's transform from data to latent, its elements by an op where there is one."""
        transform = self.module(context)
        pair = self.by_op(x, context, False)
        return _summed(_plain(transform).call_and_ladj(x), x) if pair is None else pair

    def inverse(self, z: Tensor, context: Tensor | None = None, /) -> Pair:
        """Run zuko's transform from latent to data, likewise."""
        transform = self.module(context)
        pair = self.by_op(z, context, True)
        return _summed(_plain(transform).inv.call_and_ladj(z), z) if pair is None else pair


class Conditional(Called):
    """A transform whose univariate transforms have parameters that a network computes."""

    def __init__(self, module: Any, features: int) -> None:
        super().__init__(module, features)
        self._form: tuple[Any, ...] = ()
        self._univariate: Univariate | None = None

    def univariate(self) -> Univariate | None:
        """Return the univariate transform, if it is one that an op knows."""
        form = self.module.univariate, self.module.shapes, self.module.total
        if form != self._form or form[0] is not self._form[0]:
            self._univariate, self._form = univariate_of(self.module), form
        return self._univariate

    def step(
        self, moves: Sequence[int], reads: Sequence[int], network: ChainNetwork | None
    ) -> ElementsStep | None:
        """Return the step of a chain; None for a network that does not fit it."""
        univariate = self.univariate()
        if univariate is None:
            return None
        turned = univariate.turn > 0
        try:
            return ElementsStep(univariate.transform, moves, reads, network, turned=turned)
        except ValueError:  # calling the library says what is wrong
            return None

    @staticmethod
    def linked(link: Link, step: ElementsStep | None) -> Link | None:
        """Return the link with the step, if there is one."""
        if step is None:
            return None
        link.steps.append(step)
        return link

    def pays(self, x: Tensor) -> bool:
        """Whether an op of the elements is faster than zuko: not for affine ones."""
        return self._spline() is not None

    def _spline(self) -> Univariate | None:
        found = self.univariate()
        return found if found is not None and isinstance(found.transform, SplineMap) else None

    def by_op(self, x: Tensor, context: Tensor | None, inverse: bool) -> Pair | None:
        """Let the network run as it is, and an op the univariate transforms if they are splines.

        Affine ones take zuko a few calls, and are not faster by an op of their own.
        """
        univariate = self._spline()
        if univariate is None or x.shape[1] != self.features or not served(x):
            return None
        if "meta" in self.module.__dict__:
            return None
        return self._apply(univariate, x, context, inverse)

    def _apply(
        self, univariate: Univariate, x: Tensor, context: Tensor | None, inverse: bool
    ) -> Pair | None:
        raise NotImplementedError

    def _params(self, x: Tensor, context: Tensor | None) -> Tensor:
        """Return ``[N, D, P]``, as zuko computes them."""
        x = x if context is None else torch.cat((x, context), -1)
        params: Tensor = self.module.hyper(x).unflatten(-1, (-1, self.module.total))
        return params


class MaskedAutoregressive(Conditional):
    """``zuko.flows.autoregressive.MaskedAutoregressiveTransform``."""

    def __init__(self, module: Any) -> None:
        inputs, outputs = sizes_of(module._modules.get("hyper"))
        self._per: int = max(1, module.total)
        super().__init__(module, outputs // self._per)
        self._context = inputs - self.features

    def link(self) -> Link | None:
        """Return the step, which takes features in the order in which the masks let them see each other."""
        module, link = self.module, Link()
        if self.univariate() is None or self._context < 0:
            return None
        link.watch(module, "univariate", "shapes", "total", "passes")
        net = module._modules.get("hyper")
        found = masked_network(net, self.features, self._context, self._per, link)
        if found is None:
            return None
        network, orders = found
        # zuko's inverse makes so many passes, and is one only if they are enough
        if len(set(_seen(network.seen(), self._per))) > module.passes:
            return None
        return self.linked(link, self.step(orders.features, orders.features, network))

    def _apply(
        self, univariate: Univariate, x: Tensor, context: Tensor | None, inverse: bool
    ) -> Pair | None:
        if not inverse:
            return univariate(x, self._params(x, context), False)
        found = torch.zeros_like(x)
        for _ in range(self.module.passes):
            found = univariate(x, self._params(found, context), True)[0]
        # zuko asks the way forward, which differs beyond the circle, and where the passes are too few: a layer without
        # a mask in the network lets all features see each other
        return found, -univariate(found, self._params(found, context), False)[1]


class Coupling(Conditional):
    """``zuko.flows.coupling.GeneralCouplingTransform``."""

    def __init__(self, module: Any) -> None:
        mask = module._buffers.get("mask")
        super().__init__(module, 0 if mask is None else mask.numel())

    def link(self) -> Link | None:
        """Return the step."""
        module, link = self.module, Link()
        mask = module._buffers.get("mask")
        if mask is None or mask.dim() != 1 or mask.dtype != torch.bool:
            return None
        reads = mask.nonzero().flatten().tolist()
        moves = (~mask).nonzero().flatten().tolist()
        link.watch(module, "univariate", "shapes", "total")
        net = module._modules.get("hyper")
        network = dense_network(net, len(reads), sizes_of(net)[0] - len(reads), link)
        if network is None:
            return None
        link.holds.append(Holds(module, "mask"))
        return self.linked(link, self.step(moves, reads, network))

    def _apply(
        self, univariate: Univariate, x: Tensor, context: Tensor | None, inverse: bool
    ) -> Pair | None:
        mask = self.module._buffers["mask"]
        if mask is None or mask.dtype != torch.bool:
            return None
        reads, moves = mask.nonzero().flatten(), (~mask).nonzero().flatten()
        kept = x[:, reads]
        moved, log_det = univariate(x[:, moves], self._params(kept, context), inverse)
        order = torch.cat((reads, moves)).argsort()
        return torch.cat((kept, moved), -1)[:, order], log_det


class ElementWise(Conditional):
    """``zuko.flows.gaussianization.ElementWiseTransform``."""

    early = True

    def __init__(self, module: Any) -> None:
        per = max(1, module.total)
        net, phi = module._modules.get("hyper"), module._modules.get("phi")
        features = 0
        if net is not None:
            features = sizes_of(net)[1] // per
        elif type(phi) is torch.nn.ParameterList and len(phi):
            features = len(phi[0])
        super().__init__(module, features)

    def link(self) -> Link | None:
        """Return the step, whose parameters follow from the context alone, or are the same for all samples."""
        module, link = self.module, Link()
        link.watch(module, "univariate", "shapes", "total")
        moves, net = range(self.features), module._modules.get("hyper")
        network = None
        if net is not None:
            network = dense_network(net, 0, sizes_of(net)[0], link)
            if network is None:
                return None
        elif not self._constant(link):
            return None
        return self.linked(link, self.step(list(moves), [], network))

    def _constant(self, link: Link) -> bool:
        phi = self.module._modules.get("phi")
        if type(phi) is not torch.nn.ParameterList:
            return False
        names = [*phi._parameters]
        if len(names) != len(self.module.shapes):
            return False
        link.context_features = 0
        link.watch(phi)
        link.make(phi, names[:1], functools.partial(_packed, phi))
        return True

    def _apply(
        self, univariate: Univariate, x: Tensor, context: Tensor | None, inverse: bool
    ) -> Pair | None:
        net = self.module._modules.get("hyper")
        # zuko has called it already, for the transform that it made
        if context is None or net is None or not _may_be_called_again(net):
            return None
        params = net(context).unflatten(-1, (-1, self.module.total))
        return univariate(x, params, inverse)


class Unconditional(Called):
    """``zuko.lazy.UnconditionalTransform`` of a transform that a chain knows."""

    early = True

    def __init__(self, module: Any) -> None:
        known = UNCONDITIONAL.get(name_of(module.f))
        tensors = {**module._parameters, **module._buffers}
        self._known, self._tensors = known, [*tensors]
        sizes = [t.shape[-1] for t in tensors.values() if t is not None and t.dim()]
        super().__init__(module, max(sizes, default=0) if known else 0)

    def link(self) -> Link | None:
        """Return the step."""
        module, link = self.module, Link()
        count = module._nargs + len(module._keys)
        if self._known is None or len(self._tensors) != count:
            return None
        link.watch(module, "f", "_nargs", "_keys")
        return link if self._known(module, self._tensors, self.features, link) else None


class Inverse(Called):
    """``zuko.lazy.LazyInverse`` of a transform that a chain knows."""

    def __init__(self, module: Any, inner: Called) -> None:
        super().__init__(module, inner.features)
        self._inner, self.early = inner, inner.early

    def link(self) -> Link | None:
        """Return the steps of the transform, of which this is the inverse."""
        link = self._inner.link()
        if link is None or self.module._modules.get("transform") is not self._inner.module:
            return None
        link.watch(self.module)
        link.backwards = not link.backwards
        return link


def sizes_of(net: Any) -> tuple[int, int]:
    """Return how many numbers a network reads and returns; zeros for one of another form."""
    if not (is_of(net, "nn.MLP") or is_of(net, "nn.MaskedMLP")):
        return 0, 0
    layers = [*net._modules.values()]
    ends = [_shape_of(layers[i]) for i in (0, -1)] if layers else []
    first, last = ends if len(ends) == 2 else (None, None)
    return (0, 0) if first is None or last is None else (first[1], last[0])


def _shape_of(layer: Any) -> tuple[int, int] | None:
    """Return how many numbers a linear layer returns and reads; None for others, and for stacks of them.

    A weight that is parametrized is not asked for: spectral normalization makes a step at each look.
    """
    if (weight := layer._parameters.get("weight")) is not None:
        return (weight.shape[0], weight.shape[1]) if weight.dim() == 2 else None
    outputs, inputs = (getattr(layer, name, None) for name in ("out_features", "in_features"))
    return (outputs, inputs) if isinstance(outputs, int) and isinstance(inputs, int) else None


def _may_be_called_again(net: torch.nn.Module) -> bool:
    """Whether nobody would notice another call of a network: it draws nothing, keeps nothing and has no hooks."""
    return all(
        not hooked(part)
        and "forward" not in part.__dict__
        and (
            is_of(part, "nn.MLP", "nn.Linear", "nn.Residual", "nn.LayerNorm")
            or (type(part).__module__ == _ACTIVATIONS and type(part) is not torch.nn.RReLU)
        )
        for part in net.modules()
    )


def _packed(phi: torch.nn.ParameterList, inverse: bool) -> Sequence[Tensor]:
    """Return parameters that are the same for all samples, those of one feature together."""
    parts = [*phi._parameters.values()]
    columns = [p if p.dim() == 2 else p[:, None] for p in parts if p is not None]
    return [torch.cat(columns, 1).flatten()]


def _seen(rows: list[int], per: int) -> list[int]:
    return [max(rows[i : i + per]) for i in range(0, len(rows), per)]


def _plain(transform: Any) -> Any:
    """Return a transform that asks for no chain again."""
    transform._door = None
    return transform


def _summed(pair: Pair, x: Tensor) -> Pair:
    """Return log-determinants of samples, of those of elements."""
    y, log_det = pair
    return y, log_det.sum(-1) if log_det.dim() == x.dim() else log_det
