"""Wrong arguments of the ops are refused by name: what was wanted, what was given."""

import inspect
import math
from functools import partial

import numpy
import pytest
import torch

from pyflowkern import ops, use_reference

X, BYTES = torch.randn(4, 6), torch.zeros(2, 3, dtype=torch.uint8)
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


SMAP = ops.SplineMap(bins=3)
PARAMS, COUPLED = torch.zeros(4, 6, SMAP.params), torch.zeros(4, 3 * SMAP.params)
PARTS = torch.zeros(4, 6, 3), torch.zeros(4, 6, 3), torch.zeros(4, 6, 2)
NETWORK = [torch.ones(5, 6), torch.ones(6, 5)], [torch.zeros(5), torch.zeros(6)]
PLU = torch.arange(3), EYE, EYE, ZEROS, torch.ones(3)
SIX, EYE6, ZERO = torch.zeros(6), torch.eye(6), torch.tensor(0.0)
SEED = torch.tensor(3)


def _cases(name, flags, call):
    """Return the cases of a function and its reference: name, flag, and a call that takes the flag."""
    functions = {n: getattr(ops, n) for n in (name, name + "_reference") if hasattr(ops, n)}
    return [(n, flag, partial(call, f)) for n, f in functions.items() for flag in flags]


RESIDUAL = {"residual": True}
FLAGS = [
    *_cases("affine", ["inverse"], lambda f, **o: f(X, X, X, **o)),
    *_cases("affine_coupling", ["inverse", "swap"], lambda f, **o: f(X, X, **o)),
    *_cases("spline", ["inverse", "elementwise"], lambda f, **o: f(X, PARAMS, SMAP, **o)),
    *_cases(
        "rational_quadratic_spline", ["inverse", "elementwise"], lambda f, **o: f(X, *PARTS, **o)
    ),
    *_cases("spline_coupling", ["inverse", "swap"], lambda f, **o: f(X, COUPLED, SMAP, **o)),
    *_cases("actnorm", ["inverse"], lambda f, **o: f(X, SIX, SIX, **o)),
    *_cases("invertible_linear", ["inverse"], lambda f, **o: f(X, EYE6, ZERO, **o)),
    *_cases("glow_step", ["inverse"], lambda f, **o: f(X, SIX, SIX, EYE6, ZERO, **o)),
    *_cases("plu_matrix", ["inverse"], lambda f, **o: f(*PLU, **o)),
    *_cases("logit", ["inverse"], lambda f, **o: f(X.sigmoid(), **o)),
    *_cases(
        "relu_network",
        ["residual", "activate_last"],
        lambda f, **o: f(X, *NETWORK, **(RESIDUAL | o)),
    ),
    *_cases(
        "field_divergence",
        ["per_probe", "regularizers"],
        lambda f, **o: f(X, *NETWORK, probe=SEED, probes=2, **o),
    ),
    ("hutchinson_trace", "with_norm", partial(ops.hutchinson_trace, X, X)),
    ("channel_split_sizes", "swap", partial(ops.channel_split_sizes, 4)),
    ("ScaleMap", "shift_first", partial(ops.ScaleMap, "exp")),
    ("ScaleMap", "divide", partial(ops.ScaleMap, "exp")),
    ("MaskedLayer", "gated", partial(ops.MaskedLayer, torch.ones(3, 3).tril(-1))),
]
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
    ours, theirs = call(**{flag: True}), call(**{flag: numpy.bool_(True)})
    if isinstance(ours, torch.Tensor | tuple):
        torch.testing.assert_close(theirs, ours, rtol=0, atol=0, equal_nan=True)


def test_every_flag_of_a_public_function_is_tested():
    public = {
        (name, parameter.name)
        for name in ops.__all__
        for parameter in inspect.signature(getattr(ops, name)).parameters.values()
        if parameter.annotation == "bool"
    }
    assert public == {(name, flag) for name, flag, _ in FLAGS}
