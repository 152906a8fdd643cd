"""Glow's blocks and couplings on images, of normflows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from pyflowkern import ops
from pyflowkern.interop._images import Form, evaluate_sequential
from pyflowkern.interop._normflows.parts import Awaits, is_named, scale_map_of
from pyflowkern.interop._watches import is_fixed
from pyflowkern.ops import ScaleMap

__all__ = ["BlockForm", "CouplingForm"]

_COUPLING = ("flows.reshape.Split", "flows.affine.coupling.AffineCoupling", "flows.reshape.Merge")
_BLOCK = (
    "flows.affine.coupling.AffineCouplingBlock",
    "flows.mixing.Invertible1x1Conv",
    "flows.normalization.ActNorm",
)


class CouplingForm(Form):
    """An AffineCouplingBlock of channels: which of them pass, and by which network the others are transformed."""

    def __init__(self, swap: bool, scale_map: ScaleMap, net: torch.nn.Module) -> None:
        super().__init__()
        self.swap, self.scale_map, self.net = swap, scale_map, net
        self.layers: list[Any] = []
        self.activations: list[Any] = []

    @classmethod
    def read(cls, module: torch.nn.Module) -> CouplingForm | None:
        """Return the form of an AffineCouplingBlock; None for one that splits otherwise."""
        flows = module._modules.get("flows")
        parts: list[Any] = [] if flows is None else [*flows._modules.values()]
        if flows is None or len(parts) != 3 or not all(map(is_named, parts, _COUPLING)):
            return None
        split, coupling, merge = parts
        modes = {split.mode, merge.mode}
        net = coupling._modules.get("param_map")
        scale_map = scale_map_of(coupling.scale, coupling.scale_map)
        if len(modes) != 1 or not modes <= {"channel", "channel_inv"}:
            return None
        if net is None or scale_map is None:
            return None
        form = cls(modes == {"channel_inv"}, scale_map, net)
        link = form.link
        link.watch(module)
        link.watch(flows)
        link.watch(split, "mode")
        link.watch(merge, "mode")
        link.watch(coupling, "scale", "scale_map")
        form._read_net()
        return form

    def _read_net(self) -> None:
        """Note the layers of a ConvNet2d; of others the network is called."""
        if not is_named(self.net, "nets.cnn.ConvNet2d"):
            return
        inner = self.net._modules.get("net")
        if type(inner) is not torch.nn.Sequential:
            return
        layers = [*inner._modules.values()]
        if self.net.__dict__.get("forward") is None:
            self.link.watch(self.net)
            self.link.watch(inner)
            self.layers, self.activations = layers[0::2], layers[1::2]
            first, last = layers[0], layers[-1]
            if type(first) is type(last) is torch.nn.Conv2d:
                per = 1 if self.scale_map.kind == "additive" else 2
                self.channels = first.in_channels + last.out_channels // per

    def run(self, x: Tensor, tensors: list[Tensor], inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Run the coupling: ``inverse`` is from latent to data, which the library calls forward."""
        first, second = ops.channel_split_sizes(x.shape[1])
        given, moved = (x[:, first:], first) if self.swap else (x[:, :first], second)
        params = evaluate_sequential(given, self.net, self.layers, self.activations)
        count = moved if self.scale_map.kind == "additive" else 2 * moved
        if params.shape != (x.shape[0], count, *x.shape[2:]) or not moved:
            return None  # which the library itself refuses
        return ops.affine_coupling(
            x,
            params,
            swap=self.swap,
            scale_map=self.scale_map,
            params_layout="interleaved",
            inverse=not inverse,
        )


class BlockForm(Form):
    """A GlowBlock: coupling, 1x1 convolution and ActNorm, in the order of sampling."""

    def __init__(self, coupling: CouplingForm, channels: int, factors: bool) -> None:
        super().__init__()
        self.coupling, self.channels, self.factors = coupling, channels, factors

    @classmethod
    def read(cls, module: torch.nn.Module) -> BlockForm | None:
        """Return the form of a GlowBlock; None for one of other parts."""
        flows = module._modules.get("flows")
        parts: list[Any] = [] if flows is None else [*flows._modules.values()]
        if flows is None or len(parts) != 3 or not all(map(is_named, parts, _BLOCK)):
            return None
        first, mixing, norm = parts
        coupling = CouplingForm.read(first)
        s, t = (norm._parameters.get(name) for name in "st")
        if coupling is None or s is None or t is None:
            return None
        channels = mixing.num_channels
        if s.shape != (1, channels, 1, 1) or t.shape != s.shape or norm.batch_dims != [0, 2, 3]:
            return None
        form = cls(coupling, channels, bool(mixing.use_lu))
        link = form.link
        link.append(coupling.link)
        link.watch(module)
        link.watch(flows)
        link.watch(mixing, "use_lu", "num_channels")
        link.watch(norm, "batch_dims")
        link.waits.append(Awaits(norm))
        link.read(norm, "s", "t")
        if form.factors:
            if not is_fixed(link, mixing, "eye", torch.eye(channels, device="cpu")):
                return None
            link.read(mixing, "P", "L", "U", "log_S", "sign_S")
        else:
            link.read(mixing, "W")
        return form

    def run(self, x: Tensor, tensors: list[Tensor], inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Run the block: three ops."""
        s, t, *mixing = tensors
        log_scale, bias = -s.view(-1), -t.view(-1)
        found = self._matrix(mixing, inverse)
        if found is None:
            return None
        matrix, log_abs_det = found
        step = ops.glow_step
        if inverse:
            if (moved := self.coupling.run(x, [], True)) is None:
                return None
            z, more = step(moved[0], log_scale, bias, matrix, log_abs_det, inverse=True)
            return z, more + moved[1]
        y, more = step(x, log_scale, bias, matrix, log_abs_det)
        if (moved := self.coupling.run(y, [], False)) is None:
            return None
        return moved[0], more + moved[1]

    def _matrix(self, mixing: list[Tensor], inverse: bool) -> tuple[Tensor, Tensor] | None:
        """Return the matrix of a direction, and the logarithm of the determinant of the one from data to latent."""
        if self.factors:
            p, lower, upper, log_diag, sign = mixing
            order = p.argmax(1)
            return ops.plu_matrix(
                order, lower, upper, log_diag, sign, inverse=inverse
            ), log_diag.sum()
        (weight,) = mixing
        if not inverse:
            return weight, torch.linalg.slogdet(weight)[1]
        # the library inverts in float64, too
        sign, log_abs_det, inverted = ops.slogdet_inverse(weight.double())
        if not sign:  # the library says what is wrong
            return None
        return inverted.to(weight.dtype), log_abs_det.to(weight.dtype)
