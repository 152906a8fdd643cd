"""Wrong arguments of the ops are refused by name: what was wanted, what was given."""

import math
from functools import partial

import numpy
import pytest
import torch
from cases import CASES
from laws import Sample
from laws.op_arguments import flags_of, outcome

from pyflowkern import ops, use_reference

X, BYTES = torch.randn(4, 6), torch.zeros(2, 3, dtype=torch.uint8)
SEED = torch.tensor(3)
EYE, ZEROS = torch.eye(3), torch.zeros(3)


def plu(*permutation):
    return ops.plu_matrix(torch.tensor(permutation), EYE, EYE, ZEROS, torch.ones(3))


@pytest.mark.parametrize("reference", [False, True])
@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: ops.affine(X, X, None), TypeError, "shift must be a torch.Tensor, got NoneType"),
        (lambda: ops.affine(X.to_sparse(), X, X), TypeError, "x must be a dense tensor"),
        (lambda: ops.affine(X.to(torch.float8_e4m3fn), X, X), TypeError, "x must .*float8"),
        (lambda: ops.affine(X, X, X, scale_map=None), ValueError, "scale_map must be .*None"),
        (lambda: ops.affine_coupling(X, X, params_layout=3), ValueError, "params_layout .* 3"),
        (lambda: ops.affine_coupling(X, X, split=None), TypeError, "split must .*NoneType"),
        (lambda: ops.affine_coupling(X, X, split=[True] * 6), TypeError, "split must .*list"),
        (lambda: plu(0, 1, 7), ValueError, r"permutation must hold indices of 0 ... 2.*7"),
        (lambda: plu(0, 1, -1), ValueError, "permutation must hold indices"),
        (
            lambda: ops.dequantize(BYTES + 40, bits=5),
            ValueError,
            r"x must hold values below 2\^bits = 32, got 40",
        ),
        (lambda: ops.scale_map([]), ValueError, r"scale_map must be .*got \[\]"),
        (lambda: ops.channel_split_sizes("4"), TypeError, "channels must be an int, got str"),
        (lambda: ops.channel_split_sizes(-3), ValueError, "channels must be at least 0"),
        (lambda: ops.checkerboard_mask("x"), TypeError, "event_shape must be a list, got str"),
        (lambda: ops.checkerboard_mask(3), TypeError, "event_shape must be a list, got int"),
        (lambda: ops.checkerboard_mask((3,)), ValueError, r"\[C, \*space\], got event_shape"),
        (lambda: ops.checkerboard_mask((3, 2.5)), TypeError, r"event_shape\[1\] must be an int"),
        (lambda: ops.rademacher(3, (2,)), TypeError, "seed must be an int64 tensor, got .*int"),
        (lambda: ops.rademacher(torch.ones(()), (2,)), TypeError, "seed must .*float32"),
        (lambda: ops.rademacher(torch.arange(2), (2,)), ValueError, "seed must have no axes"),
        (lambda: ops.rademacher(SEED, 2), TypeError, "shape must be a list, got int"),
        (lambda: ops.rademacher(SEED, (-1,)), ValueError, r"shape\[0\] must be at least 0"),
        (lambda: ops.rademacher(SEED, (1,), torch.int64), TypeError, "dtype must be a floating"),
        (lambda: ops.draw_probe("x"), TypeError, "x must be a torch.Tensor, got str"),
        (lambda: ops.draw_probe(X, probes=0), ValueError, "probes must be at least 1"),
        (lambda: ops.draw_probe(X, seed="1"), TypeError, "seed must be an int or None, got str"),
        (lambda: ops.MaskedLayer(EYE, source="x"), TypeError, "source must be an int, got str"),
        (lambda: ops.MaskedLayer(EYE, residual=0.5), TypeError, "residual must be an int"),
        (lambda: ops.MaskedLayer(EYE, source=-2), ValueError, "source must be at least -1"),
    ],
)
def test_ops(call, error, message, reference):
    with use_reference(reference), pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"clamp": math.inf}, ValueError, "clamp must be finite, got inf"),
        ({"gain": math.nan}, ValueError, "gain must be finite, got nan"),
        ({"eps": math.nan}, ValueError, "eps must be finite, got nan"),
        ({"gain": "2"}, TypeError, "gain must be a number, got str"),
        ({"clamp": torch.tensor(2.0)}, TypeError, "clamp must be a number, got Tensor"),
        ({"max_scale": -1.0}, ValueError, "max_scale must be above eps"),
        ({"max_scale": math.nan}, ValueError, "max_scale must be finite"),
    ],
)
def test_scale_maps(options, error, message):
    with pytest.raises(error, match=message):
        ops.ScaleMap("softplus", **options)


def calls():
    """Yield each flag of a public function and of its reference: its name, and a call that takes it."""
    for case in CASES:
        if str(case) in ops.__all__:
            sample = next(iter(case.small(torch.float32)))
            for name in {str(case), f"{case}_reference"} & {*ops.__all__}:
                call = partial(getattr(ops, name), **sample.tensors, **sample.fixed)
                yield from ((name, flag, call) for flag in flags_of(getattr(ops, name)))
    yield "channel_split_sizes", "swap", partial(ops.channel_split_sizes, 4)
    yield "ScaleMap", "shift_first", partial(ops.ScaleMap, "exp")
    yield "ScaleMap", "divide", partial(ops.ScaleMap, "exp")
    yield "MaskedLayer", "gated", partial(ops.MaskedLayer, torch.ones(3, 3).tril(-1))
    yield "ChainLayer", "bias", partial(ops.ChainLayer, 3, 2)
    yield "ChainLayer", "context_bias", partial(ops.ChainLayer, 3, 2, context="add")
    layers = [ops.ChainLayer(3, 2), ops.ChainLayer(3, 3)]
    for flag in ("residual", "activate_last", "activate_blocks"):
        yield "ChainNetwork", flag, partial(ops.ChainNetwork, layers)
    yield "ElementsStep", "centred", partial(ops.ElementsStep, ops.ScaleMap("exp"), [0, 1])
    yield "ElementsStep", "turned", partial(ops.ElementsStep, ops.SplineMap(bins=3), [0, 1])


FLAGS = sorted(calls(), key=lambda flag: flag[:2])
flags = pytest.mark.parametrize(
    ("flag", "call"), [pytest.param(flag, call, id=f"{name}-{flag}") for name, flag, call in FLAGS]
)


@flags
def test_a_flag_is_true_or_false(flag, call):
    """Kernels take flags as bits of one number: a 2 was another flag, and a -1 all of them."""
    for value in (None, 2, 3, -1, -5, 1, 0, 4, 8, 16, 1.0, "yes", torch.tensor(True)):
        with pytest.raises(TypeError, match=f"{flag} must be True or False, got"):
            call(**{flag: value})


@flags
def test_a_flag_may_be_numpys(flag, call):
    for value in (True, False):
        ours, theirs = (
            outcome(call, Sample({}, **{flag: v})) for v in (value, numpy.bool_(value))
        )
        if isinstance(ours, list):
            torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)
        else:
            assert theirs == ours  # of two flags that go together


def test_every_flag_of_a_public_function_is_tested():
    public = {(name, flag) for name in ops.__all__ for flag in flags_of(getattr(ops, name))}
    assert public == {flag[:2] for flag in FLAGS}
