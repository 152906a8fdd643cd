"""What a layer is: a module with two directions, each with its log-determinant."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributions import Transform, constraints

from pyflowkern.core.checks import check_batched, check_choice
from pyflowkern.core.dtypes import accumulation_dtype
from pyflowkern.nn._drift import Guard
from pyflowkern.nn._hooks import may_be_read
from pyflowkern.nn._reversible import MEMORY, makes_again, run_again
from pyflowkern.nn.chain import Chains, Layer, Run, served
from pyflowkern.nn.links import Link

__all__ = [
    "Bijection",
    "BijectionTransform",
    "Sequential",
    "zero_log_det",
]


class Bijection(torch.nn.Module):
    r"""An invertible map :math:`z = f(x)` with the log-determinant of the direction that ran.

    Subclasses define ``forward(x, context=None) -> (z, log_det)`` and
    ``inverse(z, context=None) -> (x, log_det)``, with ``log_det`` of shape ``[N]``, float32 at
    least.  A layer that changes the shape of an event also overrides :meth:`output_shape` and
    :meth:`input_shape`.  A direction that is not defined raises NotImplementedError.

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> class Double(nn.Bijection):
        ...     def forward(self, x, context=None):
        ...         return 2 * x, x.new_full(x.shape[:1], x[0].numel() * 0.6931)
        ...     def inverse(self, z, context=None):
        ...         return z / 2, z.new_full(z.shape[:1], -z[0].numel() * 0.6931)
        >>> z, log_det = Double()(torch.ones(3, 2))
        >>> tuple(z.shape), tuple(log_det.shape)
        ((3, 2), (3,))
    """

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data ``[N, ...]`` to latent; return ``(z, log_det[N])``."""
        raise NotImplementedError(f"{type(self).__name__} has no forward")

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent ``[N, ...]`` to data; return ``(x, log_det[N])`` of this direction."""
        raise NotImplementedError(f"{type(self).__name__} has no inverse")

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the event shape of ``forward(x)[0]`` for events ``x`` of this shape."""
        return shape

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the event shape of ``inverse(z)[0]`` for events ``z`` of this shape."""
        return shape

    def _way_back(self, inverse: bool) -> str:
        """Return how a backward pass comes by the input of a call, of :meth:`inverse` if so, that was not kept.

        ``"invert"``: the other direction finds it.  ``"keep"``: that direction costs much more than memory, and the
        input is kept.  ``"call"``: the layer takes care itself, or must not be called twice.
        """
        return "invert"

    def _chain_link(self) -> Link | None:
        """Return what this layer is in a chain (:func:`pyflowkern.ops.chain`); None where it must be called."""
        return None

    def transform(
        self, context: Tensor | None = None, *, event_dim: int = 1, cache_size: int = 0
    ) -> BijectionTransform:
        """Return this layer as a :class:`torch.distributions.Transform` from data to latent.

        Args:
            context: context ``[*batch, K]`` of every call.
            event_dim: axes of one event: 1 for vectors, 3 for images ``[C, H, W]``.
            cache_size: 1 keeps the last call, so that its log-determinant costs no second pass; see
                :class:`BijectionTransform` for what that asks of the caller.

        Example:
            >>> import torch
            >>> from pyflowkern import nn
            >>> t = nn.ActNorm(2).eval().transform()
            >>> tuple(t.log_abs_det_jacobian(torch.ones(5, 4, 2), t(torch.ones(5, 4, 2))).shape)
            (5, 4)
        """
        return BijectionTransform(self, context, event_dim, event_dim, cache_size=cache_size)


class BijectionTransform(Transform):
    """A :class:`Bijection` as a torch Transform; all leading axes go through the layer at once.

    Args:
        bijection: the layer.
        context: context ``[*batch, K]``, broadcast against the leading axes.
        domain_dim: axes of one event of the data.
        codomain_dim: axes of one event of the latent.
        cache_size: 1 keeps the last call, its result and its log-determinant, and returns them for
            the same tensor object.  As with every torch Transform, the caller must not change the tensor
            or the layer's parameters between the two calls, or must call :meth:`clear_cache` after
            such a change.
        domain: where the data lie, over events; None for all real numbers.
        codomain: where the latent lies.

    Raises:
        ValueError: for a cache size but 0 and 1, and when called as the layer.

    Example:
        >>> import torch
        >>> from torch.distributions import Independent, Normal, TransformedDistribution
        >>> from pyflowkern import nn
        >>> base = Independent(Normal(torch.zeros(2), torch.ones(2)), 1)
        >>> density = TransformedDistribution(base, [nn.ActNorm(2).eval().transform().inv])
        >>> tuple(density.log_prob(torch.zeros(7, 2)).shape)
        (7,)
    """

    bijective = True

    def __init__(
        self,
        bijection: Bijection,
        context: Tensor | None = None,
        domain_dim: int = 1,
        codomain_dim: int = 1,
        *,
        cache_size: int = 0,
        domain: constraints.Constraint | None = None,
        codomain: constraints.Constraint | None = None,
    ) -> None:
        super().__init__(cache_size=cache_size)
        self.bijection, self.context = bijection, context
        self.domain_dim, self.codomain_dim = domain_dim, codomain_dim
        self.domain = domain or constraints.independent(constraints.real, domain_dim)
        self.codomain = codomain or constraints.independent(constraints.real, codomain_dim)
        self._last: tuple[Tensor, Tensor] | None = None

    def __eq__(self, other: object) -> bool:
        """Whether two transforms have the same layer and the same context; their caches are not compared."""
        return (
            isinstance(other, BijectionTransform)
            and self.bijection is other.bijection
            and self.context is other.context
            and (self.domain_dim, self.codomain_dim) == (other.domain_dim, other.codomain_dim)
        )

    __hash__ = None  # type: ignore[assignment]  # as of all transforms of torch that compare

    def clear_cache(self) -> None:
        """Forget the last call.  With ``cache_size=1``, call this after the layer's parameters have changed."""
        self._cached_x_y = None, None
        self._last = None

    def with_cache(self, cache_size: int = 1) -> BijectionTransform:
        """Return the same transform with another cache size."""
        return BijectionTransform(
            self.bijection,
            self.context,
            self.domain_dim,
            self.codomain_dim,
            cache_size=cache_size,
            domain=self.domain,
            codomain=self.codomain,
        )

    def _call(self, x: Tensor) -> Tensor:
        y, log_det = self._batched(self.bijection, x, self.domain_dim)
        self._remember(x, log_det)
        return y

    def _inverse(self, y: Tensor) -> Tensor:
        x, log_det = self._batched(self.bijection.inverse, y, self.codomain_dim)
        self._remember(x, -log_det)
        return x

    def log_abs_det_jacobian(self, x: Tensor, y: Tensor) -> Tensor:
        """Return the log-determinant of the forward direction at ``x``, one number an event."""
        if self._last is not None and self._last[0] is x:
            return self._last[1]
        return self._batched(self.bijection, x, self.domain_dim)[1]

    def forward_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """Return the shape of ``y`` for ``x`` of this shape."""
        return _replace_event(shape, self.domain_dim, self.bijection.output_shape)

    def inverse_shape(self, shape: tuple[int, ...]) -> torch.Size:
        """Return the shape of ``x`` for ``y`` of this shape."""
        return _replace_event(shape, self.codomain_dim, self.bijection.input_shape)

    def _remember(self, x: Tensor, log_det: Tensor) -> None:
        if self._cache_size:
            self._last = (x, log_det)

    def _batched(
        self, direction: Callable[..., tuple[Tensor, Tensor]], t: Tensor, event_dim: int
    ) -> tuple[Tensor, Tensor]:
        """Run one direction with all leading axes as one batch axis."""
        cut = t.dim() - event_dim
        lead, event = t.shape[:cut], t.shape[cut:]
        context = self.context
        if context is not None:
            lead = torch.broadcast_shapes(lead, context.shape[:-1])
            t = t.expand(*lead, *event)
            context = context.expand(*lead, context.shape[-1]).reshape(
                lead.numel(), context.shape[-1]
            )
        out, log_det = direction(t.reshape(lead.numel(), *event), context)
        return out.reshape(*lead, *out.shape[1:]), log_det.reshape(lead)


class Sequential(Bijection):
    r"""Bijections one after another: :math:`\log\det = \sum_i \log\det_i`.

    On vectors, layers of this package whose networks are known (``MLP``, ``ResidualMLP``, ``MaskedMLP``) are not called
    one by one: :func:`pyflowkern.ops.chain` runs as many of them as follow each other, forward and back.  It reads
    their tensors at each call.  A layer is called where anything hangs on it or on a part of it (hooks,
    parametrizations, subclasses and modules in the place of others), and all are under autocast, compilers and
    function transforms.

    With ``memory="reversible"`` no activations are kept while gradients are recorded, but for the output: the backward
    pass finds the input of each layer from its output by its inverse, and runs the layer once more.  Memory does then
    not grow with the number of layers, and a step takes about a third longer.  Gradients are the same but for rounding.
    Layers whose inverse costs much (autoregressive, continuous) or is not exact enough keep their inputs; runs that
    one op replaces keep the inputs ``[N, D]`` of their transforms, as always.  docs/memory.md says more.

    Args:
        *layers: bijections, data side first.
        memory: ``"stored"`` or ``"reversible"``.

    Raises:
        TypeError: for a layer that is not a :class:`Bijection`.
        ValueError: for another ``memory``.
        RuntimeError: for a second derivative through ``memory="reversible"``.

    Source of ``memory="reversible"``: Gomez, Ren, Urtasun and Grosse, "The Reversible Residual Network: Backpropagation
    Without Storing Activations" (2017).

    Example:
        >>> import torch
        >>> from pyflowkern import nn
        >>> flow = nn.Sequential(nn.ActNorm(4), nn.InvertibleLinear(4), nn.Reverse(4)).eval()
        >>> z, log_det = flow(torch.randn(3, 4))
        >>> len(flow), tuple(z.shape)
        (3, (3, 4))
    """

    #: Of files and copies that do not know of it, too.
    memory = "stored"

    def __init__(self, *layers: Bijection, memory: str = "stored") -> None:
        super().__init__()
        self.memory = check_choice("memory", memory, MEMORY)
        for i, layer in enumerate(layers):
            if not isinstance(layer, Bijection):
                raise TypeError(f"layers[{i}] must be a Bijection, got {type(layer).__name__}")
        self.layers = torch.nn.ModuleList(layers)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the layers in order."""
        if self.memory == "reversible" and makes_again(x, context):
            return self._again(x, context, inverse=False)
        given, total = x, None
        for part in self._parts(x) if served(x) else self:
            if isinstance(part, Run):
                x, log_det = part(x, context, checked=x is given)
            else:
                x, log_det = part(x, context)
            total = log_det if total is None else total + log_det
        return x, _none("x", x) if total is None else total

    def normal_log_prob(
        self, x: Tensor, context: Tensor | None = None, *, within: torch.nn.Module | None = None
    ) -> Tensor | None:
        r"""Return the log-density ``[N]`` of ``x`` for a standard normal latent where one op computes all of it.

        That is :math:`\log N(f(x); 0, I) + \log|\det J_f|`; None where the layers must be called, or this module, or
        the module ``within`` which it is called.
        """
        callers = (self,) if within is None else (self, within)
        if not served(x) or not may_be_read(callers, *map(type, callers)):
            return None
        parts = self._parts(x)
        if len(parts) != 1 or not isinstance(parts[0], Run):
            return None
        pair = parts[0].fused(x, context, "normal", checked=True)
        return None if pair is None else pair[1]

    def _parts(self, x: Tensor) -> Sequence[Layer | Run]:
        """Return the layers, or runs of them that one op replaces, where :func:`served` allows it for ``x``."""
        layers: list[Any] = [*self.layers._modules.values()]
        chains = self.__dict__.get("_chains")
        if (
            chains is None or chains.owner is not self.__dict__["_modules"]
        ):  # of an older file, or of another
            chains = self.__dict__["_chains"] = Chains(self.__dict__["_modules"])
        parts: list[Layer | Run] | None = chains.parts(layers, x)
        return layers if parts is None else parts

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Run the inverses in reverse order."""
        if self.memory == "reversible" and makes_again(z, context):
            return self._again(z, context, inverse=True)
        given, total = z, None
        for part in reversed(self._parts(z) if served(z) else list(self)):
            if isinstance(part, Run):
                z, log_det = part(z, context, inverse=True, checked=z is given)
            else:
                z, log_det = part.inverse(z, context)
            total = log_det if total is None else total + log_det
        return z, _none("z", z) if total is None else total

    def _again(self, x: Tensor, context: Tensor | None, inverse: bool) -> tuple[Tensor, Tensor]:
        """Run the layers in one direction without keeping what is between them."""
        guards = self.__dict__.setdefault("_guards", (Guard(), Guard()))
        found = run_again(
            self._flat(x if served(x) else None, inverse), x, context, inverse, guards[inverse]
        )
        return (x, _none("z" if inverse else "x", x)) if found is None else found

    def _flat(self, x: Tensor | None, inverse: bool) -> Iterator[Layer | Run]:
        """Yield layers, and runs of them that serve ``x`` if given, in the order of a direction.

        Those of sequences inside are among them.
        """
        parts = list(self) if x is None else self._parts(x)
        for part in reversed(parts) if inverse else parts:
            if type(part) is Sequential and may_be_read((part,), Sequential):
                yield from part._flat(x, inverse)
            else:
                yield part

    def _way_back(self, inverse: bool) -> str:
        return "call" if self.memory == "reversible" else "invert"

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the event shape after the last layer."""
        for layer in self:
            shape = layer.output_shape(shape)
        return shape

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the event shape before the first layer."""
        for layer in reversed(list(self)):
            shape = layer.input_shape(shape)
        return shape

    def __len__(self) -> int:
        return len(self.layers)

    def __iter__(self) -> Iterator[Bijection]:
        return iter(self.layers)  # type: ignore[arg-type]

    def __getitem__(self, index: int) -> Bijection:
        return self.layers[index]  # type: ignore[return-value]


def _none(name: str, x: Tensor) -> Tensor:
    """Return the log-determinant of no layers."""
    check_batched(name, x)
    return zero_log_det(x)


def zero_log_det(x: Tensor) -> Tensor:
    """Return the log-determinant of a volume-preserving map, ``[N]`` zeros."""
    return x.new_zeros(x.shape[0], dtype=accumulation_dtype(x.dtype))


def _replace_event(
    shape: tuple[int, ...], event_dim: int, map_event: Callable[[tuple[int, ...]], tuple[int, ...]]
) -> torch.Size:
    cut = len(shape) - event_dim
    return torch.Size((*shape[:cut], *map_event(tuple(shape[cut:]))))
