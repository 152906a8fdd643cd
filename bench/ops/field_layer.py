"""Bias, gate and activation after a layer's product, and whole convolutional fields, against plain PyTorch."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from bench._case import Case, Inputs, Lazy, Outputs, Provider, nbytes, random_inputs
from pyflowkern import nn, ops

TIME = 0.3


def _layers(parameters: dict[str, Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
    count = len(parameters) // 3
    return [(parameters[f"w{i}"], parameters[f"b{i}"], parameters[f"t{i}"]) for i in range(count)]


def _bias_and_gate(bias: Tensor, time: Tensor) -> tuple[Tensor, Tensor]:
    """Return bias and gate of each channel in a "concatsquash" layer at time ``TIME``."""
    gate = torch.sigmoid(TIME * time[0] + time[1])
    return TIME * time[2] + gate * bias, gate


def _net(x: Tensor, parameters: dict[str, Tensor]) -> Tensor:
    """FFJORD's layers as they are usually written."""
    layers = _layers(parameters)
    for i, (w, b, t) in enumerate(layers):
        gate = torch.sigmoid(TIME * t[0] + t[1])[:, None, None]
        x = F.conv2d(x, w, b, padding=1) * gate + (TIME * t[2])[:, None, None]
        x = torch.tanh(x) if i < len(layers) - 1 else x
    return x


def vjp(x: Tensor, probe: Tensor, **parameters: Tensor) -> Outputs:
    """FFJORD's estimate: the field, one VJP with a graph, and its product with the probe."""
    recorded = torch.is_grad_enabled()
    with torch.enable_grad():
        x = x if x.requires_grad else x.requires_grad_()
        y = _net(x, parameters)
        (ej,) = torch.autograd.grad(y, x, probe, create_graph=recorded)
    return y, (ej * probe).flatten(1).sum(1)


def stacked(x: Tensor, probe: Tensor, **parameters: Tensor) -> Outputs:
    """Values and tangents stacked in one batch, in plain PyTorch."""
    n, h = len(x), torch.cat([x, probe])
    *layers, (last, bias, time) = _layers(parameters)
    for w, b, t in layers:
        product = F.conv2d(h, w, padding=1)
        h = ops.field_layer_reference(product, *_bias_and_gate(b, t), tangents=1)
    b, gate = (v[:, None, None] for v in _bias_and_gate(bias, time))
    h = gate * F.conv2d(h, last, padding=1)
    return h[:n] + b, (h[n:] * probe).flatten(1).sum(1)


def convolutions(x: Tensor, probe: Tensor, **parameters: Tensor) -> Outputs:
    """Only the convolutions that "ours" and "stacked" need, in the faster layout: a lower bound."""
    h = torch.cat([x, probe]).to(memory_format=torch.channels_last)
    for w, _, _ in _layers(parameters):
        h = F.conv2d(h, w, padding=1)
    return h[: len(x)], h[len(x) :, 0, 0, 0]


def module(inputs: Inputs) -> Provider:
    """Our field as a provider, with the inputs of the call in place of its parameters."""
    weights = [value for name, value in inputs.items() if name.startswith("w")]
    hidden = [w.shape[0] for w in weights[:-1]]
    field = nn.VectorFieldConv(weights[0].shape[1], hidden, "tanh", "concatsquash")
    for layer in field.layers:
        del layer.weight, layer.bias

    def ours(x: Tensor, probe: Tensor, **parameters: Tensor) -> Any:
        for layer, (w, b, _) in zip(field.layers, _layers(parameters), strict=True):
            layer.weight, layer.bias = w, b
        field.__dict__["times"] = [t for _, _, t in _layers(parameters)]
        return field.velocity_and_divergence(TIME, x, probe=probe)

    del field.times
    return ours


# --- cases ---------------------------------------------------------------------------------------


def make_inputs(shape: Sequence[int], hidden: Sequence[int]) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        found = {"x": normal(*shape), "probe": normal(*shape).sign()}
        for i, (a, b) in enumerate(itertools.pairwise((shape[1], *hidden, shape[1]))):
            found |= {f"w{i}": normal(b, a, 3, 3) / (9 * a) ** 0.5, f"b{i}": normal(b)}
            found[f"t{i}"] = normal(3, b)
        return found

    return make


def _flops(inputs: Inputs) -> float:
    """Operations of the values and of one tangent in every product; a backward is twice that."""
    pixels = inputs["x"].numel() // inputs["x"].shape[1]
    return 4.0 * pixels * sum(t.numel() for name, t in inputs.items() if name.startswith("w"))


def field(name: str, shape: Sequence[int], hidden: Sequence[int], **case: Any) -> Case:
    return Case(
        name=name,
        make_inputs=make_inputs(shape, hidden),
        providers={
            "eager": vjp,
            "ours": Lazy(module),
            "stacked": stacked,
            "convolutions": Lazy(lambda inputs: convolutions, comparable=False),
        },
        passes=("forward", "forward+backward"),
        forward_bytes=lambda inputs, outputs: nbytes(*inputs.values(), *outputs),
        flops=_flops,
        constants=("probe",),
        compiles=False,  # torch.compile takes no autograd.grad inside
        **case,
    )


def layer(name: str, shape: Sequence[int], channels_last: bool, **case: Any) -> Case:
    n, c, *space = shape
    return Case(
        name=name,
        make_inputs=random_inputs(channels_last, p=(2 * n, c, *space), bias=(c,), gate=(c,)),
        providers={
            "eager": partial(ops.field_layer_reference, tangents=1),
            "ours": partial(ops.field_layer, tangents=1),
        },
        passes=("forward", "forward+backward"),
        **case,
    )


CASES = [
    field(
        "conv field 64x1x8x8 32x2",
        (64, 1, 8, 8),
        (32, 32),
        targets={"forward vs eager": 1.2, "forward+backward vs eager": 1.2},
    ),
    field(
        "conv field 16x3x32x32 64x2",
        (16, 3, 32, 32),
        (64, 64),
        targets={"forward vs eager": 1.2, "forward+backward vs eager": 1.2},
    ),
    layer("layer 16x64x32x32 channels_last", (16, 64, 32, 32), True),
    layer("layer 16x64x32x32", (16, 64, 32, 32), False, extra=True),
    layer("layer 64x32x8x8 channels_last", (64, 32, 8, 8), True, extra=True),
]
