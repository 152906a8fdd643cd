r"""A U-Net as a vector field :math:`f(t, x)` on images, with its divergence."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

from pyflowkern._library import transformed
from pyflowkern.core.activations import ACTIVATIONS as FUNCTIONS
from pyflowkern.core.checks import check_choice, check_context, check_count
from pyflowkern.core.dtypes import accumulation_dtype, cast, full_precision
from pyflowkern.nn._fields import FieldLinear, as_time
from pyflowkern.nn._hooks import may_be_read
from pyflowkern.nn._stacked import StackedField
from pyflowkern.ops.field import ACTIVATIONS
from pyflowkern.ops.field_layer import activate_layer, spread

__all__ = ["VectorFieldUNet"]

GROUPS = 8  # of channels, at most; each is normalized together
FREQUENCIES = 16  # of the sines and cosines of the time, from 1 to FASTEST
FASTEST = 64.0


class VectorFieldUNet(StackedField):
    r"""A small U-Net :math:`f(t, x)` on images, whose velocity and divergence are one pass.

    Level ``i`` has ``widths[i]`` channels and half the height and width of the level before, rounded up: images of
    any size fit.  On the way down each level has ``blocks`` residual blocks

    .. math:: h \leftarrow S h + W_2 * \sigma(g_2\, n(W_1 * \sigma(g_1\, n(h) + b_1)) + b_2),

    with 3x3 convolutions ``W``, a 1x1 convolution ``S`` where the channels change, and ``n`` that brings groups of
    a sample's channels, 8 of them at most, to mean 0 and variance 1.  On the way up, blocks also take what their
    level had on the way down.  Scales and shifts :math:`g = 1 + A_g e`, :math:`b = A_b e` of each channel are linear
    in an embedding of time and context, :math:`e = \sigma(P(\cos \omega t, \sin \omega t) + C\,\text{context})`, with
    a perceptron ``P`` and frequencies from 1 to 64.  The last convolution starts at zero, and so does the field.

    Primal and tangents go through each convolution together, stacked along the batch.  They stay in the layout of the
    states: with normalizations between the convolutions, channels_last was slower on the CPU.  Exact divergences, and
    fields whose layers have hooks or were replaced, are treated as by :class:`VectorFieldConv`.  Under autocast the
    velocity alone is computed in half precision, velocity and divergence are not.

    Args:
        channels: ``C`` of states ``[N, C, H, W]``.
        widths: channels of each level, the finest first.
        activation: "tanh", "softplus", "silu" or "gelu".
        blocks: residual blocks of a level on each way.
        context_features: size ``K`` of a context ``[N, K]``; 0 for none.  For classes give their one-hot vectors.

    Raises:
        TypeError: for sizes that are not ints, and widths that are no sequence.
        ValueError: for sizes below 1, no width, or an unknown activation.

    Source: Ronneberger, Fischer and Brox 2015, *U-Net*; Wu and He 2018, *Group normalization*; Dhariwal and Nichol
    2021, *Diffusion models beat GANs on image synthesis* (scales and shifts by time and class).

    Example:
        >>> import torch
        >>> from pyflowkern import nn, ops
        >>> field, x = nn.VectorFieldUNet(1, (8, 16)), torch.randn(5, 1, 7, 9)
        >>> velocity, divergence = field.velocity_and_divergence(0.5, x, probe=ops.draw_probe(x))
        >>> tuple(velocity.shape), tuple(divergence.shape)
        ((5, 1, 7, 9), (5,))
    """

    def __init__(
        self,
        channels: int,
        widths: Sequence[int] = (32, 64),
        activation: str = "silu",
        *,
        blocks: int = 1,
        context_features: int = 0,
    ) -> None:
        super().__init__()
        self.channels, self.widths = check_count("channels", channels), _widths(widths)
        self.activation = check_choice("activation", activation, ACTIVATIONS)
        self.blocks = check_count("blocks", blocks)
        self.context_features = check_count("context_features", context_features, 0)
        pairs = list(itertools.pairwise(self.widths))

        def level(inputs: int, width: int) -> torch.nn.ModuleList:
            each = [inputs] + [width] * (self.blocks - 1)
            return torch.nn.ModuleList(_Block(size, width) for size in each)

        self.first = _convolution(self.channels, self.widths[0])
        self.down = torch.nn.ModuleList(level(width, width) for width in self.widths)
        self.halve = torch.nn.ModuleList(_convolution(a, b, stride=2) for a, b in pairs)
        self.up = torch.nn.ModuleList(level(a + b, a) for a, b in pairs)  # the finest first
        self.norm = _norm(self.widths[0])
        self.last = _convolution(self.widths[0], self.channels, bias=True)
        for parameter in self.last.parameters():
            torch.nn.init.zeros_(parameter)
        self._sizes = [norm.num_channels for norm in self._norms()]
        width = 4 * self.widths[0]
        self.of_time = torch.nn.ModuleList(
            [FieldLinear(2 * FREQUENCIES, width), FieldLinear(width, width)]
        )
        self.of_context = (
            FieldLinear(self.context_features, width, bias=False)
            if self.context_features
            else None
        )
        self.scales_and_shifts = FieldLinear(width, 2 * sum(self._sizes))

    def forward(self, t: Tensor | float, x: Tensor, context: Tensor | None = None) -> Tensor:
        """Return the velocity ``[N, C, H, W]`` at ``t``, a float, a scalar tensor or ``[N]``."""
        self._check(x)
        return cast(_Pass(self, x, 0).run(t, x, context)[0], x.dtype)

    def _run(
        self, t: Tensor | float, x: Tensor, e: Tensor | None, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        with full_precision(x):
            one_pass = _Pass(self, x, 0 if e is None else e.shape[0])
            parts = [x] if e is None else [x, e.reshape(-1, *x.shape[1:])]
            return one_pass.run(t, torch.cat([cast(p, one_pass.work) for p in parts]), context)

    def _widest(self, height: int, width: int) -> int:
        sizes = [self.channels * height * width]
        for channels, below in zip(self.widths, (*self.widths[1:], 0), strict=True):
            sizes.append(
                (channels + below) * height * width
            )  # on the way up both are side by side
            height, width = (height + 1) // 2, (width + 1) // 2
        return max(sizes)

    def _blocks(self) -> Iterator[_Block]:
        """Yield the residual blocks in the order in which they run."""
        for level in (*self.down, *reversed(list(self.up))):
            yield from level

    def _norms(self) -> Iterator[torch.nn.GroupNorm]:
        """Yield the normalizations in the order in which they run."""
        for block in self._blocks():
            yield from (block.norm1, block.norm2)
        yield self.norm

    @property
    def _may_be_read(self) -> bool:
        kinds = (torch.nn.Conv2d, torch.nn.GroupNorm, FieldLinear, torch.nn.Linear)
        parts = [m for m in self.modules() if not isinstance(m, (_Block, torch.nn.ModuleList))]
        return may_be_read((m for m in parts if m is not self), *kinds) and not any(
            (isinstance(m, torch.nn.Conv2d) and m.bias is not None and m is not self.last)
            or (isinstance(m, torch.nn.GroupNorm) and m.affine)
            for m in parts  # tangents would take a bias
        )

    def extra_repr(self) -> str:
        """Return the arguments."""
        given = f"{self.channels}, widths={self.widths}, activation={self.activation!r}"
        return f"{given}, blocks={self.blocks}, context_features={self.context_features}"


class _Block(torch.nn.Module):
    """The layers of a residual block."""

    def __init__(self, inputs: int, outputs: int) -> None:
        super().__init__()
        self.norm1, self.norm2 = _norm(inputs), _norm(outputs)
        self.conv1, self.conv2 = _convolution(inputs, outputs), _convolution(outputs, outputs)
        same = inputs == outputs
        self.shortcut = None if same else torch.nn.Conv2d(inputs, outputs, 1, bias=False)


class _Pass:
    """One pass through a U-Net, with some tangents: convolutions without a bias take them as they take the primal."""

    def __init__(self, net: VectorFieldUNet, x: Tensor, tangents: int) -> None:
        self.net, self.tangents, self.samples = net, tangents, x.shape[0]
        self.read = net._may_be_read
        own = next(p.dtype for p in net.parameters() if p.is_floating_point())
        self.own, self.work = own, accumulation_dtype(torch.promote_types(x.dtype, own))
        self.terms: list[tuple[Tensor, Tensor]] = []

    def run(
        self, t: Tensor | float, x: Tensor, context: Tensor | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``f`` and the tangents ``[K, N, C, H, W]`` of a stack ``[(1 + K) N, C, H, W]``."""
        net, given = self.net, x[: self.samples]
        self.terms = self._scales_and_shifts(as_time(t, given), given, context)
        h = cast(x, self.work)
        h = self.call(net.first, h)
        skips: list[Tensor] = []
        for i, level in enumerate(net.down):
            h = self.call(net.halve[i - 1], h) if i else h
            for block in level:  # type: ignore[attr-defined]
                h = self.block(block, h)
            skips.append(h)
        skips.pop()
        for level in reversed(list(net.up)):
            skip = skips.pop()
            h = torch.cat([F.interpolate(h, size=skip.shape[2:]), cast(skip, h.dtype)], 1)
            for block in level:  # type: ignore[attr-defined]
                h = self.block(block, h)
        h = self.call(net.last, self.activated(net.norm, h))
        primal, tangents = h[: self.samples], h[self.samples :]
        if self.read and net.last.bias is not None:
            primal = primal + cast(net.last.bias, h.dtype)[:, None, None]
        if x.is_contiguous():
            primal, tangents = primal.contiguous(), tangents.contiguous()
        rows = (self.tangents, self.samples, *x.shape[1:])
        return primal, tangents.reshape(rows) if self.tangents else None

    def block(self, block: _Block, h: Tensor) -> Tensor:
        """Add a residual block's change to its input."""
        change = self.call(block.conv1, self.activated(block.norm1, h))
        change = self.call(block.conv2, self.activated(block.norm2, change))
        return (h if block.shortcut is None else self.call(block.shortcut, h)) + change

    def call(self, layer: torch.nn.Module, h: Tensor) -> Tensor:
        """Apply a layer; a convolution whose weights may be read goes without its bias, for the tangents."""
        if not self.read:
            return layer(cast(h, self.own))  # type: ignore[no-any-return]
        weight: Tensor = cast(layer.weight, h.dtype)  # type: ignore[arg-type]
        if isinstance(layer, torch.nn.Conv2d):
            return F.conv2d(h, weight, None, layer.stride, layer.padding)
        bias: Tensor | None = layer.bias  # type: ignore[assignment]
        return F.linear(h, weight, None if bias is None else cast(bias, h.dtype))

    def activated(self, norm: torch.nn.GroupNorm, h: Tensor) -> Tensor:
        """Normalize, scale, shift and activate."""
        gate, bias = self.terms.pop(0)
        activation = self.net.activation
        h = cast(h, self.work)
        if not self.read:
            h = norm(cast(h, self.own))
            a = torch.addcmul(spread(bias, h), cast(h, bias.dtype), spread(gate, h))
            return FUNCTIONS[activation](a)
        h = _normalized(h, self.samples, self.tangents, norm.num_groups, norm.eps)
        return activate_layer(h, bias, gate, self.tangents, activation, in_place=True)

    def _scales_and_shifts(
        self, time: Tensor, x: Tensor, context: Tensor | None
    ) -> list[tuple[Tensor, Tensor]]:
        """Return what each normalization is multiplied by and what is added to it, ``[C]`` or ``[N, C]``."""
        net = self.net
        exponents = torch.linspace(0, 1, FREQUENCIES, dtype=self.work, device=x.device)
        angle = time.to(x.device, self.work)[..., None] * FASTEST**exponents
        e = torch.cat([angle.cos(), angle.sin()], -1)
        e = self.call(net.of_time[1], FUNCTIONS[net.activation](self.call(net.of_time[0], e)))
        check_context(context, net.context_features, x)
        if context is not None and net.of_context is not None:
            e = e + self.call(net.of_context, cast(context, self.work))
        e = self.call(net.scales_and_shifts, FUNCTIONS[net.activation](e))
        gates, biases = cast(e, self.work).chunk(2, -1)
        sizes = net._sizes
        return list(zip((1 + gates).split(sizes, -1), biases.split(sizes, -1), strict=True))


def _normalized(h: Tensor, samples: int, tangents: int, groups: int, eps: float) -> Tensor:
    r"""Return groups of channels with mean 0 and variance 1, and their tangents.

    With :math:`y = (x - \mu) / s` the tangent is :math:`\dot y = (\dot x - m(\dot x) - y\, m(y \dot x)) / s`, ``m``
    being the mean over a group.
    """
    primal, group = h[:samples], (-3, -2, -1)
    if not (tangents or transformed()):
        return torch.group_norm(primal, groups, eps=eps)
    # native_group_norm also returns 1 / s, but without a gradient; var() warns of batches without samples
    centred = primal.unflatten(1, (groups, -1))
    centred = centred - centred.mean(group, keepdim=True)
    variance = centred.square().mean(group, keepdim=True)
    if transformed():  # torch's op wants strides that vmap does not give it
        y: Tensor = (centred * (variance + eps).rsqrt()).flatten(1, 2)
    else:
        y = torch.group_norm(primal, groups, eps=eps)
    if not tangents:
        return y
    grouped = y.unflatten(1, (groups, -1))
    moved = h[samples:].unflatten(0, (tangents, samples)).unflatten(2, (groups, -1))
    moved = moved - moved.mean(group, keepdim=True)
    moved = moved - grouped * (grouped * moved).mean(group, keepdim=True)
    moved = moved * (variance + eps).rsqrt()
    return torch.cat([y, moved.flatten(2, 3).flatten(0, 1)])


def _convolution(
    inputs: int, outputs: int, *, stride: int = 1, bias: bool = False
) -> torch.nn.Conv2d:
    return torch.nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def _norm(channels: int) -> torch.nn.GroupNorm:
    """Return a normalization of as many groups as divide the channels, with two channels each at least."""
    most = max(1, min(GROUPS, channels // 2))
    groups = max(g for g in range(1, most + 1) if channels % g == 0)
    return torch.nn.GroupNorm(groups, channels, affine=False)


def _widths(widths: Sequence[int]) -> tuple[int, ...]:
    if isinstance(widths, str) or not isinstance(widths, Iterable):
        raise TypeError(f"widths must be a sequence of ints, got {widths!r}")
    sizes = tuple(check_count("widths", width) for width in widths)
    if not sizes:
        raise ValueError("widths must have a width at least, got none")
    return sizes
