"""Glow's parts as many scripts have them: which modules they are, and what runs in their place."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from pyflowkern import ops
from pyflowkern.interop._images import Form
from pyflowkern.interop._watches import is_fixed
from pyflowkern.nn.convolutions import convolutions
from pyflowkern.nn.links import Link
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.conv_network import evaluate_convolutions

__all__ = ["FlowForm", "PriorForm", "has", "network"]

_NORM = {"loc", "scale"}
_FACTORS = {"w_l", "w_s", "w_u"}
_OF_FACTORS = {"w_p", "u_mask", "l_mask", "s_sign", "l_eye"}
_SCALE_MAP = ScaleMap("sigmoid", offset=2.0, shift_first=True)


class PriorForm:
    """A ZeroConv2d: a 3x3 convolution of images with ones around them, times ``exp(3 scale)``.

    That is one with zeros around the images, whose weights have the factor, plus what the ones around contribute: an
    image that is the same for all samples.
    """

    def __init__(self) -> None:
        self._frame = torch.empty(0)

    def weights(self, weight: Tensor, bias: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
        """Return weight and bias with the factor."""
        factor = torch.exp(scale * 3)
        return weight * factor.view(-1, 1, 1, 1), bias * factor.view(-1)

    def border(self, x: Tensor, weight: Tensor) -> Tensor:
        """Return what the ones around contribute, ``[1, out, H, W]``."""
        height, width = x.shape[2] + 2, x.shape[3] + 2
        frame = self._frame
        if (
            frame.shape[2:] != (height, width)
            or frame.dtype != x.dtype
            or frame.device != x.device
        ):
            with torch.inference_mode(False), torch.no_grad():
                frame = torch.ones(1, 1, height, width, dtype=x.dtype, device=x.device)
                frame[:, :, 1:-1, 1:-1] = 0
            self._frame = frame
        return functional.conv2d(frame, weight.sum(1, keepdim=True))

    def evaluate(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        """Return what the layer does."""
        weight, bias = self.weights(weight, bias, scale)
        return functional.conv2d(x, weight, bias, padding=1) + self.border(x, weight)

    def of_zeros(self, x: Tensor, weight: Tensor, bias: Tensor, scale: Tensor) -> Tensor:
        """Return what the layer makes of images of zeros, which is the same for all: ``[1, out, H, W]``."""
        weight, bias = self.weights(weight, bias, scale)
        return bias.view(1, -1, 1, 1) + self.border(x, weight)

    @staticmethod
    def read(layer: Any, link: Link) -> torch.nn.Conv2d | None:
        """Note the tensors of such a layer; return its convolution, or None for others."""
        if layer is None or not has(layer, "ZeroConv2d", {"scale"}, children={"conv"}):
            return None
        conv: torch.nn.Conv2d = layer._modules["conv"]
        plain = (
            type(conv) is torch.nn.Conv2d
            and conv._parameters.keys() == {"weight", "bias"}
            and conv.kernel_size == (3, 3)
            and (conv.padding, conv.stride, conv.dilation) == ((0, 0), (1, 1), (1, 1))
            and conv.groups == 1
            and conv.padding_mode == "zeros"
        )
        if not plain or layer.scale.shape != (1, conv.out_channels, 1, 1):
            return None
        link.watch(layer)
        link.watch(conv, "padding", "stride", "dilation", "groups", "padding_mode")
        link.read(conv, "weight", "bias")
        link.read(layer, "scale")
        return conv


class FlowForm(Form):
    """ActNorm, 1x1 convolution and coupling, data side first."""

    def __init__(self, channels: int, factors: bool, affine: bool, net: Any) -> None:
        super().__init__()
        self.channels, self.factors, self.affine = channels, factors, affine
        self._net, self._last = net, PriorForm()

    @classmethod
    def read(cls, module: Any) -> FlowForm | None:
        """Return the form of a Flow; None for one of other parts."""
        parts = module._modules
        if parts.keys() != {"actnorm", "invconv", "coupling"} or module._parameters:
            return None
        norm, mixing, coupling = parts["actnorm"], parts["invconv"], parts["coupling"]
        factors = has(mixing, "InvConv2dLU", _FACTORS, _OF_FACTORS)
        if not has(norm, "ActNorm", _NORM, {"initialized"}) or norm.loc.dim() != 4:
            return None
        if not factors and not has(mixing, "InvConv2d", {"weight"}):
            return None
        if not has(coupling, "AffineCoupling", children={"net"}):
            return None
        net = coupling._modules["net"]
        if type(net) is not torch.nn.Sequential or len(net) != 5:
            return None
        affine = coupling.affine
        if not isinstance(affine, bool) or norm.logdet is not True:
            return None
        form = cls(norm.loc.shape[1], factors, affine, net)
        link = form.link
        link.watch(module)
        link.watch(norm, "logdet")
        link.watch(mixing)
        link.watch(coupling, "affine")
        link.watch(net)
        link.waits.append(_Awaits(norm))
        link.read(norm, "loc", "scale")
        if PriorForm.read(net[4], link) is None:
            return None
        if factors:
            ones = torch.ones(mixing.l_eye.shape, device="cpu")
            masks = {"l_mask": ones.tril(-1), "u_mask": ones.triu(1), "l_eye": ones.triu().tril()}
            if not all(is_fixed(link, mixing, *mask) for mask in masks.items()):
                return None
            link.read(mixing, "w_p", "w_l", "w_u", "w_s", "s_sign")
        else:
            link.read(mixing, "weight")
        return form

    def run(self, x: Tensor, tensors: list[Tensor], inverse: bool) -> Any:
        """Run the flow: three ops, and some on parameters."""
        loc, scale, weight, bias, factor, *mixing = tensors
        loc, scale = loc.view(-1), scale.view(-1)
        log_scale, sign = scale.abs().log(), scale.detach().sign()
        last, pixels = self._last.weights(weight, bias, factor), x.shape[2] * x.shape[3]
        if (found := self._matrix(mixing, pixels, inverse)) is None:
            return None
        matrix, log_abs_det = found
        if inverse:
            if (moved := self._couple(x, last, True)) is None:
                return None
            step = (log_scale, loc, sign.unsqueeze(1) * matrix, log_abs_det)
            return ops.glow_step(moved[0], *step, inverse=True)[0]
        y, log_det = ops.glow_step(x, log_scale, loc, matrix * sign, log_abs_det)
        if (moved := self._couple(y, last, False)) is None:
            return None
        if not self.affine:  # one number for all samples
            return moved[0], (log_scale.sum() + log_abs_det) * pixels
        return moved[0], log_det + moved[1]

    def _couple(
        self, x: Tensor, last: tuple[Tensor, Tensor], inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Run the coupling."""
        passing = (x.shape[1] + 1) // 2
        params = network(x[:, :passing], self._net, *last) + self._last.border(x, last[0])
        moved = x.shape[1] - passing
        if params.shape[1] != (2 * moved if self.affine else moved):
            return None
        return ops.affine_coupling(
            x,
            params,
            scale_map=_SCALE_MAP if self.affine else "additive",
            params_layout="blocked_raw_first" if self.affine else "blocked",
            inverse=inverse,
        )

    def _matrix(
        self, mixing: list[Tensor], pixels: int, inverse: bool
    ) -> tuple[Tensor, Tensor] | None:
        """Return the matrix of a direction, and the logarithm of the determinant of the one from data to latent."""
        if self.factors:
            p, lower, upper, log_diag, sign = mixing
            order = p.argmax(1)
            return ops.plu_matrix(
                order, lower, upper, log_diag, sign, inverse=inverse
            ), log_diag.sum()
        weight = mixing[0].flatten(1)
        if not inverse:
            # the script has that of all pixels in float32, whatever the dtype
            of_all = torch.linalg.slogdet(weight.double())[1].float() * pixels
            return weight, of_all.to(weight.dtype) / pixels
        sign, log_abs_det, inverted = ops.slogdet_inverse(weight)
        return (inverted, log_abs_det) if sign else None


class _Awaits:
    """Whether an ActNorm has seen no batch yet."""

    def __init__(self, norm: Any) -> None:
        self._norm = norm

    def __call__(self) -> bool:
        return not self._norm._buffers["initialized"]


def network(x: Tensor, net: Any, weight: Tensor, bias: Tensor) -> Tensor:
    """Return the coupling's network up to what the ones around its last layer contribute."""
    first, _, second, _, _ = inner = [*net._modules.values()]
    found = convolutions(x, [first, second], inner[1:2])
    relus = convolutions(x, [first, second], inner[3:4])
    if found is not None and relus is not None:
        weights, biases = found
        return evaluate_convolutions(x, [*weights, weight], [*biases, bias], None, False, True)
    for layer in inner[:4]:
        x = layer(x)
    return functional.conv2d(x, weight, bias, padding=1)


def has(
    module: Any,
    name: str,
    parameters: set[str] = frozenset(),  # type: ignore[assignment]
    buffers: set[str] = frozenset(),  # type: ignore[assignment]
    children: set[str] = frozenset(),  # type: ignore[assignment]
) -> bool:
    """Whether a module's class has that name, and the module exactly these parameters, buffers and parts."""
    return (
        type(module).__name__ == name
        and module._parameters.keys() == parameters
        and module._buffers.keys() == buffers
        and module._modules.keys() == children
    )
