"""Whole flows on vectors as one op, at the sizes of tables, against their formulas in plain PyTorch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from bench._case import Case, Inputs, Outputs, Provider, nbytes
from pyflowkern import ops


def masked(transform: str | ops.SplineMap, order: Sequence[int], width: int) -> ops.ElementsStep:
    """Return an autoregressive layer with two hidden layers, units sorted by degree."""
    features, per = len(order), ops.ElementsStep(transform, [0]).parameters
    degrees = [1 + u * (features - 1) // width for u in range(width)]
    hidden = [sum(d <= e for d in degrees) for e in degrees]
    last = [sum(d <= j for d in degrees) for j in range(features) for _ in range(per)]
    rows = [m * per + k for m in order for k in range(per)]
    layers = [
        ops.ChainLayer(width, features, prefixes=degrees, columns=order),
        ops.ChainLayer(width, width, prefixes=hidden),
        ops.ChainLayer(per * features, width, prefixes=last, rows=rows),
    ]
    return ops.ElementsStep(transform, order, order, ops.ChainNetwork(layers))


def coupling(
    transform: str | ops.SplineMap,
    features: int,
    width: int,
    blocks: int,
    swap: bool,
    angles: bool = False,
) -> ops.ElementsStep:
    """Return a coupling of halves, with a residual network of so many blocks, or two hidden layers for none."""
    halves = list(range(features - features // 2)), list(range(features - features // 2, features))
    reads, moves = halves[::-1] if swap else halves
    outputs = len(moves) * ops.ElementsStep(transform, [0]).parameters
    frequencies = [1.0] * len(reads) if angles else None
    sizes = [len(reads) * (1 + angles), *[width] * (2 * blocks + 1 if blocks else 2), outputs]
    layers = [ops.ChainLayer(b, a) for a, b in itertools.pairwise(sizes)]
    form = {"residual": blocks > 0, "activate_last": blocks == 0}
    net = ops.ChainNetwork(layers, frequencies=frequencies, **form)
    layout = "feature_major" if isinstance(transform, ops.SplineMap) else "blocked"
    return ops.ElementsStep(transform, moves, reads, net, layout)


def maf(features: int, width: int, transforms: int = 5) -> ops.ChainProgram:
    orders = [list(range(features))[:: (-1) ** i] for i in range(transforms)]
    steps = [masked("softclip", order, width) for order in orders]
    return ops.ChainProgram(features, steps, base="normal")


def nsf(features: int, width: int, transforms: int = 5) -> ops.ChainProgram:
    splines, steps = ops.SplineMap(bins=8, bound=5.0), list[Any]()
    for i in range(transforms):
        steps += [coupling(splines, features, width, 2, i % 2 == 1), ops.PLUStep()]
    return ops.ChainProgram(features, steps, base="normal")


def nsf_of_angles(features: int, width: int, transforms: int = 5) -> ops.ChainProgram:
    """Return circular splines, with a shift of the circle before each, and networks of cosines and sines."""
    splines, steps = ops.SplineMap(bins=8, bound=math.pi, tails="circular"), list[Any]()
    for i in range(transforms):
        steps += [ops.ShiftStep(math.pi), coupling(splines, features, width, 0, i % 2 == 1, True)]
    return ops.ChainProgram(features, steps)


def realnvp(features: int, width: int, transforms: int = 5) -> ops.ChainProgram:
    steps = list[Any]()
    for i in range(transforms):
        steps += [ops.ActNormStep(), coupling("tanh", features, width, 0, i % 2 == 1)]
    return ops.ChainProgram(features, steps, base="normal")


def constant(wanted: Any, like: Tensor) -> Tensor | None:
    """Return what is no input: the permutation of a matrix and the signs of its diagonal."""
    if wanted.integers:
        return torch.arange(wanted.shape[0], device=like.device).flip(0)
    return like.new_ones(wanted.shape) if wanted.name.startswith("sign") else None


def provider(
    function: Callable[..., tuple[Tensor, Tensor]], program: ops.ChainProgram
) -> Provider:
    def run(x: Tensor, **given: Tensor) -> tuple[Tensor, Tensor]:
        known = [constant(wanted, x) for wanted in program.tensors]
        tensors = [given[f"t{i}"] if t is None else t for i, t in enumerate(known)]
        return function(x, program, tensors)

    return run


def make_inputs(samples: int, program: ops.ChainProgram) -> Callable[..., Inputs]:
    def make(generator: torch.Generator, device: torch.device, dtype: torch.dtype) -> Inputs:
        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=generator, device=device).to(dtype)

        found: Inputs = {"x": normal(samples, program.features)}
        for i, wanted in enumerate(program.tensors):
            if constant(wanted, found["x"]) is None:
                # splines of small parameters: gradients near a knot of a narrow bin differ by its side
                scale = 0.4 * max(wanted.shape[-1], 1) ** -0.5 if len(wanted.shape) == 2 else 0.1
                found[f"t{i}"] = scale * normal(*wanted.shape)
        return found

    return make


def flops_of(program: ops.ChainProgram) -> Callable[[Inputs], float]:
    """Return what counts the products with the weights that count: masked ones need not be multiplied."""
    weights = 0
    for step in program.steps:
        if isinstance(step, ops.ElementsStep):
            for layer in () if step.network is None else step.network.layers:
                full = layer.outputs * layer.inputs
                weights += full if layer.prefixes is None else sum(layer.prefixes)
        elif isinstance(step, (ops.LinearStep, ops.PLUStep)):
            weights += program.features**2
    return lambda inputs: 2.0 * inputs["x"].shape[0] * weights


def _backward_bytes(inputs: Inputs, outputs: Outputs) -> int:
    """Read the gradients of the outputs, the data and the parameters, write as many gradients."""
    return 2 * nbytes(*inputs.values()) + nbytes(*outputs)


def flow(name: str, samples: int, program: ops.ChainProgram, **case: Any) -> Case:
    """Return a case; wide layers are left out on CUDA, where flows call them one by one."""
    return Case(
        name=f"{name}, {samples} samples",
        make_inputs=make_inputs(samples, program),
        providers={
            "eager": provider(ops.chain_reference, program),
            "ours": provider(ops.chain, program),
        },
        passes=("forward", "forward+backward"),
        backward_bytes=_backward_bytes,
        flops=flops_of(program),
        **case,
    )


CASES = [
    flow("MAF D=6, 5 x (50, 50)", 200, maf(6, 50)),
    # torch's compiler is left out: what it makes of the reference ends the process (2.13, CPU)
    flow("MAF D=43, 5 x (512, 512)", 1000, maf(43, 512), compiles=False, devices=("cpu",)),
    flow("NSF D=6, 5 x 50", 200, nsf(6, 50)),
    flow("NSF D=20, 8 x 64", 4096, nsf(20, 64, 8)),
    flow("RealNVP D=6, 5 x (50, 50)", 200, realnvp(6, 50)),
    flow("NSF of angles D=6, 5 x (64, 64)", 200, nsf_of_angles(6, 64), devices=("cpu",)),
    flow("MAF D=6, 5 x (50, 50)", 1, maf(6, 50), extra=True),
    flow("NSF D=6, 5 x 50", 1, nsf(6, 50), extra=True),
    *(
        flow(name, 4096, make(6, 50), devices=("cuda",))
        for name, make in (
            ("MAF D=6, 5 x (50, 50)", maf),
            ("NSF D=6, 5 x 50", nsf),
            ("RealNVP D=6, 5 x (50, 50)", realnvp),
        )
    ),
]
