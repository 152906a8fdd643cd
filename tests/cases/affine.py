"""affine and affine_coupling."""

import itertools

import torch
from laws import EMPTY, OpCase, Sample, few_elements, normal

from pyflowkern.ops import (
    ScaleMap,
    affine,
    affine_coupling,
    affine_coupling_reference,
    affine_reference,
    channel_split_sizes,
    scale_map,
)

MAPS = [
    "exp",
    "tanh",
    "atan",
    "sigmoid",
    "softplus",
    "softclip",
    "additive",
    "softplus_asinh",
    "softplus_tanh",
    ScaleMap("exp", gain=0.5, offset=-1e-10, eps=1e-10),  # torchflows
    ScaleMap("sigmoid", offset=2.0, eps=1e-3),  # nflows
    ScaleMap("sigmoid", offset=2.0, divide=True),  # normflows
    ScaleMap("sigmoid", offset=2.0, shift_first=True),  # glow-pytorch
    ScaleMap("softplus", eps=1e-3, max_scale=3.0),  # nflows, clamped
    ScaleMap("softplus", shift_first=True, divide=True),
    ScaleMap("tanh", clamp=1.9, gain=0.19, shift_gain=0.1),  # FrEIA, AllInOneBlock
    ScaleMap("atan", clamp=1.9, gain=1.9),  # FrEIA, GLOWCouplingBlock
    ScaleMap("sigmoid", offset=1.0, max_scale=3.0, shift_first=True, shift_gain=-2.0),
    ScaleMap("sigmoid", max_scale=0.5, eps=1e-3, divide=True),
    ScaleMap("softplus_asinh", gain=3.0, eps=0.1, max_scale=2.0),
    ScaleMap("softplus_tanh", gain=2.0, clamp=1.5, offset=1.0, shift_first=True, shift_gain=0.3),
    ScaleMap("additive", shift_gain=0.1),
]
PARAMS = [a + b for a in ("blocked", "interleaved", "feature_major") for b in ("", "_raw_first")]
SHAPES = [(3, 2), (1, 129), (127, 3), (4, 1000), (2, 3, 7), (2, 5, 3, 3), (2, 12, 8, 8)]


def coupling(
    shape, dtype=torch.float64, smap="tanh", layout="blocked", split="channel", **options
):
    """Arguments of affine_coupling; ``split="mask"`` draws one."""
    n, c, *space = shape
    per = 1 if scale_map(smap).kind == "additive" else 2
    where = normal(c, *space, seed=3) > 0 if split == "mask" else split
    if split == "channel":
        c = channel_split_sizes(c, options.get("swap", False))[1]
    held = (n, c, *space, per) if layout.startswith("feature") else (n, per * c, *space)
    tensors = {"x": normal(*shape, dtype=dtype), "params": normal(*held, seed=1, dtype=dtype)}
    return Sample(tensors, split=where, scale_map=smap, params_layout=layout, **options)


def coupling_samples(dtype):
    for smap, inverse, save in itertools.product(MAPS, (False, True), ("input", "output")):
        if save == "input" or dtype.itemsize > 2:  # a half output does not give back the input
            yield coupling((2, 5, 3, 7), dtype, smap, inverse=inverse, save=save)
    for shape, layout in itertools.product(SHAPES, ("blocked", "interleaved")):
        yield coupling(shape, dtype, layout=layout)
    for i, (shape, mask, swap) in enumerate(few_elements()):
        for layout, inverse in ((PARAMS[i % 6], i % 2 == 0), (PARAMS[-1 - i % 6], i % 2 == 1)):
            yield coupling(shape, dtype, "tanh", layout, mask, swap=swap, inverse=inverse)
    if dtype in (torch.float16, torch.bfloat16):
        return
    for layout, split, swap, smap in itertools.product(
        PARAMS, ("channel", "checkerboard", "mask"), (False, True), ("tanh", "additive")
    ):
        for shape in ((2, 6, 8, 8), (3, 5, 3, 5)):
            sample = coupling(shape, dtype, smap, layout, split, swap=swap)
            yield sample
            yield sample.map(_channels_last)


def _channels_last(t):
    return t.contiguous(memory_format=torch.channels_last) if t.dim() == 4 else t


def coupling_small(dtype):
    for i, smap in enumerate(MAPS):
        yield coupling(
            (3, 3), dtype, smap, inverse=i % 2 == 1, save=("input", "output")[i // 2 % 2]
        )
    for split, swap in itertools.product(("channel", "checkerboard", "mask"), (False, True)):
        yield coupling((3, 3, 2, 2), dtype, split=split, swap=swap)
    for layout in PARAMS[1:]:
        yield coupling((3, 4, 3), dtype, layout=layout)
    yield coupling((3, 4, 2, 3), dtype).map(_channels_last)  # whose gradients are laid out like it


def affine_sample(dtype, raw=(3, 5), shift=(3, 5), smap="exp", n=4, event=(3, 5), **options):
    """Arguments of affine; parameters of no batch axis are those of all samples."""
    tensors = {
        "x": normal(n, *event, dtype=dtype),
        "raw_scale": None if raw is None else normal(n, *raw, seed=1, dtype=dtype),
        "shift": normal(n, *shift, seed=2, dtype=dtype),
    }
    return Sample(tensors, scale_map=smap, **options)


def affine_samples(dtype):
    for smap, inverse in itertools.product(MAPS, (False, True)):
        raw = None if smap == "additive" else (3, 5)
        yield affine_sample(dtype, raw, smap=smap, inverse=inverse)
    for (n, *event), smap in itertools.product(EMPTY, ("exp", "softplus", "additive")):
        raw = None if smap == "additive" else event
        yield affine_sample(dtype, raw, event, smap, n, event, inverse=smap == "exp")
    yield affine_sample(dtype, (3, 1), (1, 5))
    sample = affine_sample(dtype)
    for raw, shift in (((3, 1), (5,)), ((), (1,))):
        sample.tensors |= {
            k: normal(*s, dtype=dtype) for k, s in (("raw_scale", raw), ("shift", shift))
        }
        yield sample


def affine_small(dtype):
    for smap in ("exp", "softclip"):
        yield affine_sample(dtype, smap=smap)
    yield affine_sample(dtype, (3, 1), (1, 5), inverse=True)
    yield affine_sample(dtype, None, (1, 5), smap="additive")


CASES = [
    OpCase(
        affine_coupling,
        affine_coupling_reference,
        coupling_samples,
        coupling_small,
        floor=2,
        reason="as plain PyTorch, whose error may be zero by chance (1 seen)",
        large=lambda: [
            coupling((3, 8, 64, 64), torch.float32),
            coupling((3000, 6), torch.float32),
        ],
        rows={"x": 0, "params": 0},
        log_det=True,
    ),
    OpCase(
        affine,
        affine_reference,
        affine_samples,
        affine_small,
        floor=2,
        reason="as affine_coupling (1 seen)",
        large=lambda: [affine_sample(torch.float32, n=3000)],
        rows={"x": 0, "raw_scale": 0, "shift": 0},
        log_det=True,
    ),
]
