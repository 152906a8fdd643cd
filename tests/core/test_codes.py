"""The integers between Python and C++ mean the same on both sides, and C++ refuses unknown ones."""

import re
from enum import Enum
from pathlib import Path
from typing import get_args

import pytest
import torch

from pyflowkern import _C, ops
from pyflowkern.core import activations, codes
from pyflowkern.ops import (
    field_time,
    linear,
    matrix,
    preprocess,
    runge_kutta,
    spline_map,
)
from pyflowkern.ops._coupling import LAYOUTS
from pyflowkern.ops._field_reference import ACTIVATIONS
from pyflowkern.ops.scale_map import Kind as ScaleKindName
from pyflowkern.ops.scale_map import scale_map_of

OPS = torch.ops.pyflowkern
ENUMS = {
    name: kinds
    for name in codes.__all__
    if isinstance(kinds := getattr(codes, name), type) and issubclass(kinds, Enum)
}


def test_the_enumerations_of_both_languages_are_the_same():
    ours = {name: {m.name: m.value for m in kinds} for name, kinds in ENUMS.items()}
    assert _C.codes() == ours


def test_the_limits_of_both_languages_are_the_same():
    assert {name: getattr(codes, name) for name in _C.limits()} == _C.limits()


def _constant(path, name):
    """Return a constant of a C++ header, which Python cannot ask."""
    text = (Path(__file__).resolve().parents[2] / "csrc" / path).read_text()
    return int(re.search(rf"constexpr int [^;]*\b{name} = (\d+)", text)[1])


def test_sizes_typed_in_both_languages_are_the_same():
    assert _constant("runge_kutta/runge_kutta.h", "kMaxSlopes") == runge_kutta.MAX_SLOPES
    # one more for what lies behind the segments
    assert _constant("runge_kutta/runge_kutta.h", "kMaxSegments") == runge_kutta.MAX_SEGMENTS + 1
    assert _constant("field_time/field_time.h", "kTimeLayers") == field_time._MOST_LAYERS
    assert _constant("linear/linear_mix.cuh", "kMost") == linear._MAX_CHANNELS
    assert _constant("matrix/matrix_cuda.cu", "kMaxSize") == matrix._MAX_SIZE
    assert _constant("preprocess/preprocess.h", "kNoiseBits") == preprocess._NOISE_BITS


@pytest.mark.parametrize(
    ("names", "kinds"),
    [
        (get_args(ScaleKindName), codes.ScaleKind),
        (get_args(spline_map.Kind), codes.SplineKind),
        (get_args(spline_map.Tails), codes.SplineTails),
        (get_args(spline_map.Parameterization), codes.SplineParameterization),
        (ACTIVATIONS, codes.FieldActivation),
        (activations.ACTIVATIONS, codes.MaskedActivation),
        ([a + b for b in ("", "_raw_first") for a in LAYOUTS], codes.ParamsLayout),
    ],
)
def test_public_names_are_those_of_the_enumerations(names, kinds):
    assert list(names) == list(codes.numbered(kinds))


def test_maps_come_back_from_what_kernels_are_given():
    for kind in get_args(ScaleKindName):
        smap = ops.ScaleMap(kind, gain=0.5, shift_gain=0.1, shift_first=True, divide=kind == "exp")
        assert scale_map_of(smap.code, smap.numbers, smap.flags) == smap
    for tails in get_args(spline_map.Tails):
        smap = ops.SplineMap(bins=5, tails=tails, bound=2.0, scale=0.5)
        assert spline_map.spline_map_of(smap.form, smap.numbers) == smap


X = torch.randn(4, 6)
SMAP = ops.SplineMap(bins=3)
EXP, SPLINE = ops.ScaleMap("exp"), (*SMAP.form, SMAP.numbers)
NETWORK = [torch.ones(5, 6), torch.ones(6, 5)], [torch.zeros(5), torch.zeros(6)], []
PLAN = ops.MaskedPlan([ops.MaskedLayer(torch.ones(6, 6).tril(-1).repeat_interleave(2, 0))], 6)


def affine(kind=0, flags=0):
    return OPS.affine.default(X, X, X, kind, EXP.numbers, flags)


def coupling(layout=0, kind=0, flags=0):
    return OPS.affine_coupling.default(X, X, None, layout, kind, EXP.numbers, flags)


def spline(kind=0, tails=0, parameterization=0, bins=3, flags=0):
    params = torch.zeros(4, 6, SMAP.params)
    form = kind, tails, parameterization, bins
    return OPS.spline.default(X, None, params, None, None, None, *form, SMAP.numbers, flags)


def field(activation=0, flags=0, probes=2):
    probe = torch.ones(2, 4, 6)
    return OPS.field_divergence.default(X, probe, probes, *NETWORK, activation, flags)


def exact(activation=0, flags=0):
    return OPS.field_exact.default(X, *NETWORK, activation, flags)


def density(wanted):
    return OPS.normal_log_prob_backward.default(torch.ones(4), X, None, None, wanted)


def layer(activation=0, tangents=0):
    return OPS.field_layer.default(X, torch.zeros(6), None, tangents, activation)


def quantize(bits):
    return OPS.quantize.default(X, bits, None)


def autoregressive(family=0, kind=0, tails=0, parameterization=0, bins=3, flags=0, change=None):
    weights, biases = PLAN.pack([torch.ones(12, 6)], [None])
    structure = PLAN.structure()
    if change is not None:
        structure[codes.StructureHead.WIDEST + 1 + change[0]] = change[1]
    numbers = EXP.numbers if family == 0 else SMAP.numbers
    code = family, kind, tails, parameterization, bins, numbers, flags
    return OPS.autoregressive_inverse.default(
        X, PLAN.table, PLAN.table, weights, biases, structure, *code
    )


def row(row):
    w = torch.ones(2, dtype=torch.float64)
    return OPS.rk_stage.default(torch.zeros(2, 4, 6), X, row, X, w, 0.1, None)


def error(sizes):
    w = torch.ones(2, dtype=torch.float64)
    return OPS.rk_error.default(X, X, torch.zeros(2, 4, 6), w, 0.1, None, 0.1, 0.1, sizes)


BAD = (-1, -5, 2**31, 2**40)


@pytest.mark.parametrize(
    ("call", "argument", "values"),
    [
        (affine, "kind", [9, *BAD]),
        (affine, "flags", [32, *BAD]),
        (coupling, "layout", [6, *BAD]),
        (coupling, "kind", [9, *BAD]),
        (coupling, "flags", [32, *BAD]),
        (spline, "kind", [4, *BAD]),
        (spline, "tails", [4, *BAD]),
        (spline, "parameterization", [3, *BAD]),
        (spline, "bins", [0, 1, 65, *BAD]),
        (spline, "flags", [16, *BAD]),
        (field, "activation", [4, *BAD]),
        (field, "flags", [16, codes.FieldFlag.FLAT.value, *BAD]),
        (field, "probes", [-1, 1, 3]),
        (error, "sizes", [[-1, 25], [25]]),
        (exact, "activation", [4, *BAD]),
        (exact, "flags", [16, *BAD]),
        (density, "wanted", [8, *BAD]),
        (layer, "activation", [4, *BAD]),
        (layer, "tangents", [-1, 2, -5]),
        (quantize, "bits", [0, 9, *BAD]),
        (autoregressive, "family", [2, *BAD]),
        (autoregressive, "kind", [9, *BAD]),
        (autoregressive, "flags", [32, *BAD]),
        (
            autoregressive,
            "change",
            [
                (codes.StructureLayer.SOURCE, 0),
                (codes.StructureLayer.RESIDUAL, 0),
                (codes.StructureLayer.SEEN_THROUGH, 9),
                (codes.StructureLayer.FLAGS, 4),
            ],
        ),
        (row, "row", [2, -1]),
    ],
)
def test_kernels_refuse_unknown_integers(call, argument, values):
    for value in values:
        with pytest.raises(
            RuntimeError,
            match=r"must be|is of 1|must stack|must read|fit each other|2 to 64|sizes beyond",
        ):
            call(**{argument: value})
