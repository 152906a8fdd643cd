"""A flow: a bijection from data to latent, and a base distribution there."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributions import Distribution

from pyflowkern import ops
from pyflowkern.core.checks import check_count, check_dtype, check_number
from pyflowkern.flows._arguments import check_flags, check_temperature, expand_context, parse_shape
from pyflowkern.flows._chunks import Array, decode_in_chunks, log_prob_in_chunks
from pyflowkern.flows._domain import Domain, PixelDomain, without_density
from pyflowkern.flows._forms import FlowForms
from pyflowkern.flows._hints import warn_of_unsuitable
from pyflowkern.flows._one_op import log_prob_by_one_op
from pyflowkern.flows._torch_base import as_base
from pyflowkern.nn import Bijection, Dequantize, MultiScale

__all__ = ["Flow"]


class Flow(FlowForms):
    r"""A density model: :math:`\log p(x) = \log p_Z(f(x)) + \log|\det \partial f / \partial x|`.

    ``forward`` maps data to a latent ``z`` that is always one tensor ``[N, D]``;
    :meth:`split_latents` gives the parts of a multi-scale flow.

    With ``bits`` set the flow models pixels: ``preprocess`` is a
    :class:`~pyflowkern.nn.Dequantize`.  A uint8 ``x`` gets fresh noise at every call, its
    ``log_prob`` is that of the pixel levels and ``bits_per_dim`` the usual figure for discrete
    data.  A floating ``x`` is a point of ``[0, 1]`` and ``log_prob`` its density there;
    ``bits_per_dim`` adds ``bits``, which makes the two comparable. Samples are floats in
    ``[0, 1]``, or uint8 with ``quantized=True``.  The margin of the logit lets a little mass lie
    beyond: ``domain`` is :math:`[-m, 1 + m]` with :math:`m = \alpha / (1 - 2\alpha)`.

    Outside of a bounded ``domain`` the log-density is -inf.

    Args:
        bijection: data to latent.
        event_shape: shape of one ``x``.
        base: the latent's distribution: a module with ``log_prob(z[N, D]) -> [N]`` and
            ``sample(n, *, temperature, generator) -> [n, D]``, or a
            :class:`torch.distributions.Distribution` with event shape ``(D,)``, whose tensors move
            with the flow but are no parameters of it; None for the standard normal.
        bits: bits a pixel of integer data, 1 to 8; None for real data.
        alpha: keeps pixels from the ends of the logit, for flows with ``bits``.
        context_features: size ``K`` of the context ``[N, K]``; 0 for an unconditional flow.
        domain: ends of the interval that each element of ``x`` lies in and that the bijection maps
            onto itself; None for the real line.
        periodic: the ends of the domain are the same point, as of angles.

    Raises:
        TypeError: for a bijection that is none, a base without the two methods, or counts that are not ints.
        ValueError: for an event shape without positive sizes, bits or alpha out of range, a base of
            another shape, and a domain with ``bits``.

    Source: Rezende and Mohamed, "Variational inference with normalizing flows" (2015); Papamakarios, Nalisnick,
    Rezende, Mohamed and Lakshminarayanan, "Normalizing flows for probabilistic modeling and inference" (2021).

    Example:
        >>> import torch
        >>> from pyflowkern import flows, nn
        >>> flow = flows.Flow(nn.Sequential(nn.ActNorm(2), nn.InvertibleLinear(2)), (2,))
        >>> log_prob = flow.log_prob(torch.randn(16, 2))
        >>> tuple(log_prob.shape), tuple(flow.sample(5).shape)
        ((16,), (5, 2))
    """

    _anchor: Tensor

    def __init__(
        self,
        bijection: Bijection,
        event_shape: Sequence[int],
        *,
        base: torch.nn.Module | Distribution | None = None,
        bits: int | None = None,
        alpha: float = 0.05,
        context_features: int = 0,
        domain: tuple[float, float] | None = None,
        periodic: bool = False,
    ) -> None:
        super().__init__()
        if not isinstance(bijection, Bijection):
            raise TypeError(f"bijection must be a nn.Bijection, got {type(bijection).__name__}")
        check_flags(periodic=periodic)
        check_number("alpha", alpha)
        if domain is not None and bits is not None:
            raise ValueError(f"domain must be None with bits={bits}, got {domain}")
        self.context_features = check_count("context_features", context_features, 0)
        self.event_shape = parse_shape(event_shape)
        self.dims = math.prod(self.event_shape)
        self.preprocess = None if bits is None else Dequantize(check_count("bits", bits), alpha)
        self._domain = None if domain is None else Domain.between(domain, periodic)
        if self.preprocess is not None:
            self._domain = PixelDomain.of(alpha)
        self.bijection = bijection
        self.base = as_base(base, self.dims)
        self._looked = False  # at the first data, for a hint
        self._latent_shape = bijection.output_shape(self.event_shape)
        # a dtype and a device for flows without parameters, too
        self.register_buffer("_anchor", torch.zeros(()), persistent=False)

    def forward(self, x: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map data to latent.

        Args:
            x: ``[N, *event_shape]`` in the flow's dtype; with ``bits`` also uint8.
            context: ``[N, K]`` for a conditional flow, or one context ``[K]`` or ``[1, K]`` for all.

        Returns:
            ``(z, log_det)``: ``[N, D]`` and ``[N]``.

        Raises:
            TypeError: for another dtype.
            ValueError: for another shape, or a context that does not fit.
        """
        self._check_data("x", x)
        context = self._context_of(context, x.shape[0])
        y, first = (x, None) if self.preprocess is None else self._from_pixels(x)
        z, log_det = self._run(self.bijection, y, context)
        return z.flatten(1), log_det if first is None else first + log_det

    def inverse(self, z: Tensor, context: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Map latent ``[N, D]`` to data; return ``(x, log_det[N])``."""
        self._check_latent(z)
        self._check_dtype("z", z)
        context = self._context_of(context, z.shape[0])
        z = z.reshape(z.shape[0], *self._latent_shape)
        x, log_det = self._run(self.bijection.inverse, z, context)
        if self.preprocess is not None:
            x, last = self.preprocess.inverse(x)
            log_det = log_det + last
        return x, log_det

    def log_prob(
        self, x: Tensor | Array, context: Tensor | Array | None = None, *, chunk: int | None = None
    ) -> Tensor:
        """Return the log-density of ``x`` in nats, ``[N]``: -inf outside of a bounded domain.

        Where the first data on a CPU lie outside, or far from unit variance, a warning says what helps.

        Args:
            x: ``[N, *event_shape]`` as in :meth:`forward`.
            context: as in :meth:`forward`.
            chunk: compute so many rows at a time, so that memory is needed for those alone.  Gradients are those of one
                call; their memory is bounded, too, as activations are computed again.  ``x`` and a context with a row
                for each may then be NumPy arrays, such as a memory-mapped file, of any float dtype, and lie on another
                device than the flow; the result lies where ``x`` does.

        Kernels give a row the same bits with ``chunk`` as without; torch's own products may round them in another
        order.  Continuous flows choose their steps, and beyond 64 dimensions their probes, by the rows that come
        together; dropout and uint8 pixels draw random numbers at each call.

        Raises:
            TypeError: for another dtype, an array without ``chunk``, and a ``chunk`` that is no int.
            ValueError: for another shape, a context that does not fit, a ``chunk`` below 1, and any ``chunk`` where
                layers in training mode take statistics of the batch.
        """
        if chunk is not None:
            return log_prob_in_chunks(self, x, context, chunk)
        x, outside = self._inside_domain(x)
        return without_density(outside, self._log_prob_inside(x, context))

    def _way_back(self, inverse: bool) -> str:
        return "call"  # noise of pixels has no inverse, and the bijection has its own way

    def _log_prob_inside(self, x: Tensor, context: Tensor | None) -> Tensor:
        if type(self).forward is Flow.forward and self.preprocess is None:
            context = self._context_of(context, x.shape[0])
            if (by_one_op := log_prob_by_one_op(self, x, context)) is not None:
                return by_one_op
        z, log_det = self(x, context)
        return self._run(self.base.log_prob, z) + log_det  # type: ignore

    def _inside_domain(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Return data of the domain, and which samples were outside of it: ``[N]``, None for none."""
        self._check_data("x", x)
        outside = None
        if self._domain is not None and x.is_floating_point():
            inside, outside = self._domain.keep_inside(x)
        if not torch.compiler.is_compiling() and not self._looked:
            self._looked = warn_of_unsuitable(x, outside, self._domain, self.bijection)
        return x if outside is None else inside, outside

    def _from_pixels(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return pixels, or points of the unit interval, on the real line in the flow's dtype; and the log-det."""
        assert self.preprocess is not None
        if x.is_floating_point():
            return self.preprocess(x)  # type: ignore[no-any-return]
        dtype = self._anchor.dtype
        if dtype != torch.float64:
            y, log_det = self.preprocess(x)
            return y.to(dtype), log_det
        # the op computes in float32: float64 takes the middle between two of the values that it may draw
        bits, pixels = self.preprocess.bits, math.prod(x.shape[1:])
        v, _ = ops.dequantize(x, bits=bits)
        y, log_det = ops.logit(v.double() + 0.5 ** (17 + bits), alpha=self.preprocess.alpha)
        return y, log_det - pixels * bits * math.log(2)

    def bits_per_dim(
        self, x: Tensor | Array, context: Tensor | Array | None = None, *, chunk: int | None = None
    ) -> Tensor:
        r"""Return :math:`-\log_2 p(x) / D`, ``[N]``; with ``bits`` that of discrete pixels.

        Args and errors are those of :meth:`log_prob`.
        """
        given = {} if chunk is None else {"chunk": chunk}
        result = ops.bits_per_dim(self.log_prob(x, context, **given), self.dims)
        # arrays name their dtypes
        pixels = x.dtype == torch.uint8 if isinstance(x, Tensor) else x.dtype.name == "uint8"
        if self.preprocess is not None and not pixels:
            return result + self.preprocess.bits  # density on [0, 1] to probability of a level
        return result

    @torch.no_grad()
    def sample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        quantized: bool = False,
        chunk: int | None = None,
    ) -> Tensor:
        """Draw ``n`` samples, without gradient.

        For ``n`` samples of each of several contexts see :meth:`distribution`.

        Args:
            n: how many.
            context: ``[n, K]``, or one context ``[K]`` or ``[1, K]`` for all.
            temperature: factor on the latents.
            generator: source of randomness.
            quantized: return uint8 pixels (flows with ``bits``).
            chunk: compute so many samples at a time, so that memory is needed for those, the latents and the result;
                the samples are the same, but as :meth:`log_prob` says.

        Returns:
            ``[n, *event_shape]``.

        Raises:
            ValueError: for n or temperature below 0, a chunk below 1, a context of another shape, or ``quantized``
                without ``bits``.
            TypeError: for an n or a chunk that is not an int, and a ``quantized`` that is not a bool.
        """
        check_flags(quantized=quantized)
        if quantized and self.preprocess is None:
            raise ValueError(
                "quantized=True needs a flow made with bits=..., this one has bits=None"
            )
        given = {} if chunk is None else {"chunk": chunk}
        x = self.rsample(n, context, temperature=temperature, generator=generator, **given)
        if self.preprocess is None:
            return x
        return self.preprocess.quantize(x) if quantized else x.clamp(0, 1)

    def rsample(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
    ) -> Tensor:
        """Draw ``n`` samples with gradients; pixels are not cut to the unit interval.

        Args and errors are those of :meth:`sample`.
        """
        z, context = self._latents(n, context, temperature, generator)
        if chunk is None:
            return self._decode(z, context)
        return decode_in_chunks(self, lambda *a: (self._decode(*a),), z, context, chunk)[0]

    def _decode(self, z: Tensor, context: Tensor | None) -> Tensor:
        """Return the data of latents, where nothing else is wanted."""
        return self.inverse(z, context)[0]

    def sample_and_log_prob(
        self,
        n: int,
        context: Tensor | None = None,
        *,
        temperature: float = 1.0,
        generator: torch.Generator | None = None,
        chunk: int | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Draw ``n`` samples and their log-densities under this flow in one pass, with gradients.

        Args and errors are those of :meth:`sample`; the density is that of temperature 1.
        """
        z, context = self._latents(n, context, temperature, generator)
        if chunk is None:
            return self._decode_with_density(z, context)
        x, log_prob = decode_in_chunks(self, self._decode_with_density, z, context, chunk)
        return x, log_prob

    def _decode_with_density(self, z: Tensor, context: Tensor | None) -> tuple[Tensor, Tensor]:
        x, log_det = self.inverse(z, context)
        return x, self._run(self.base.log_prob, z) - log_det  # type: ignore[arg-type]

    @torch.no_grad()
    def interpolate(
        self, x0: Tensor, x1: Tensor, steps: int, context: Tensor | None = None
    ) -> Tensor:
        """Go from ``x0`` to ``x1`` along straight lines in latent space.

        Args:
            x0: start ``[N, *event_shape]``.
            x1: end, of the same shape.
            steps: number of points, both ends among them.
            context: ``[N, K]``, or one for all, used at both ends and between.

        Returns:
            ``[steps, N, *event_shape]``.

        Raises:
            ValueError: for steps below 2 or different shapes.
        """
        steps = check_count("steps", steps, 2)
        self._check_data("x0", x0)
        self._check_data("x1", x1)
        if x0.shape != x1.shape:
            raise ValueError(
                f"x0 and x1 must have one shape, got {tuple(x0.shape)} and {tuple(x1.shape)}"
            )
        context = self._context_of(context, x0.shape[0])
        z0, z1 = self(x0, context)[0], self(x1, context)[0]
        n = z0.shape[0]
        t = torch.linspace(0, 1, steps, dtype=z0.dtype, device=z0.device).view(-1, 1, 1)
        z = torch.lerp(z0, z1, t).reshape(steps * n, self.dims)
        repeated = None if context is None else context.repeat(steps, 1)
        return self.inverse(z, repeated)[0].reshape(steps, n, *self.event_shape)

    def split_latents(self, z: Tensor) -> list[Tensor]:
        """Return the latents ``[N, C, *space]`` of each level as a list, finest first."""
        self._check_latent(z)
        if isinstance(self.bijection, MultiScale):
            return self.bijection.split_latents(z)
        return [z.reshape(z.shape[0], *self._latent_shape)]

    def output_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return ``(D,)``."""
        return (self.dims,)

    def input_shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """Return the shape of one ``x``."""
        return self.event_shape

    def _latents(
        self, n: int, context: Tensor | None, temperature: float, generator: torch.Generator | None
    ) -> tuple[Tensor, Tensor | None]:
        """Return ``n`` latents and a context of each."""
        n = check_count("n", n, 0)
        check_temperature(temperature)
        context = self._context_of(context, n)
        latents = self._run(self.base.sample, n, temperature=temperature, generator=generator)  # type: ignore
        return latents, context

    def _check_latent(self, z: Tensor) -> None:
        if not isinstance(z, Tensor):
            raise TypeError(f"z must be a torch.Tensor, got {type(z).__name__}")
        if z.dim() != 2 or z.shape[1] != self.dims:
            raise ValueError(f"z must have shape [N, {self.dims}], got {tuple(z.shape)}")

    def _check_data(self, name: str, x: Tensor) -> None:
        if not isinstance(x, Tensor):
            raise TypeError(f"{name} must be a torch.Tensor, got {type(x).__name__}")
        if x.dim() != 1 + len(self.event_shape) or tuple(x.shape[1:]) != self.event_shape:
            want = ", ".join(str(size) for size in self.event_shape)
            raise ValueError(f"{name} must have shape [N, {want}], got {tuple(x.shape)}")
        if self.preprocess is None or x.dtype != torch.uint8:
            self._check_dtype(name, x)

    def _check_dtype(self, name: str, x: Tensor) -> None:
        if not x.is_floating_point():
            hint = "uint8 in a flow made with bits=8" if self.preprocess is None else "uint8"
            pixels = f" (or {hint})" if name.startswith("x") else ""
            raise TypeError(f"{name} must be {self._anchor.dtype}{pixels}, got {x.dtype}")
        check_dtype(name, x, self._anchor.dtype, "flow")

    def _check_context(self, context: Tensor | None, n: int) -> Tensor | None:
        """Return the context with a row for each of ``n`` samples; labels stay labels.  Raise where it does not fit."""
        return self._context_of(context, n)

    def _context_of(self, context: Tensor | None, n: int) -> Tensor | None:
        """Return the context of each of ``n`` samples; raise where it does not fit."""
        if self._wrapped:
            self._notice_direct_calls()
        context = expand_context(context, n, self.context_features)
        if context is not None:
            self._check_dtype("context", context)
        return context
