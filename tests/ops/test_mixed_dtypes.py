"""Kernel and reference take the same dtypes, mixed in any way, and give results of the same dtypes."""

import itertools

import pytest
import torch

from pyflowkern import _library, ops, use_reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def normal(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64) / 2


X, ROW = normal(5, 4), normal(4, seed=1)
SMAP = ops.SplineMap(bins=3)
DEGREES = torch.tensor([0, 1, 2, 3, 1, 2])
PLAN = ops.MaskedPlan(
    [
        ops.MaskedLayer(torch.arange(4) < DEGREES[:, None]),
        ops.MaskedLayer(
            torch.arange(4).repeat_interleave(2)[:, None] >= DEGREES, activation="tanh"
        ),
    ],
    features=4,
)
EYE = torch.eye(4, dtype=torch.float64) + normal(4, 4, seed=2) / 8
NORM = {ops.hutchinson_trace: {"with_norm": True}}  # the reference returns it always
ZERO = torch.tensor(0.1, dtype=torch.float64)

#: Of each function: the tensors, whose dtypes are mixed, and the call.
CASES = {
    "affine": ([X, normal(5, 4, seed=3), ROW], lambda f, x, u, t: f(x, u, t)),
    "affine_coupling": ([X, normal(5, 4, seed=3)], lambda f, x, p: f(x, p)),
    "spline": ([X, normal(5, 4, SMAP.params)], lambda f, x, p: f(x, p, SMAP)),
    "spline_coupling": ([X, normal(5, 2 * SMAP.params)], lambda f, x, p: f(x, p, SMAP)),
    "rational_quadratic_spline": (
        [X, normal(5, 4, 3), normal(5, 4, 3, seed=1), normal(5, 4, 2)],
        lambda f, *tensors: f(*tensors),
    ),
    "actnorm": ([X, ROW, ROW], lambda f, *tensors: f(*tensors)),
    "channel_moments": ([X], lambda f, x: f(x)),
    "invertible_linear": ([X, EYE, ZERO, ROW], lambda f, *tensors: f(*tensors)),
    "glow_step": ([X, ROW, ROW, EYE, ZERO], lambda f, *tensors: f(*tensors)),
    "plu_matrix": (
        [EYE, EYE, ROW, torch.ones(4, dtype=torch.float64)],
        lambda f, *tensors: f(torch.arange(4), *tensors),
    ),
    "householder_matrix": ([EYE], lambda f, v: f(v)),
    "slogdet_inverse": ([EYE], lambda f, w: f(w)),
    "normal_log_prob": (
        [X, ROW, normal(5, 4, seed=4), normal(5)],
        lambda f, z, mean, log_std, log_det: f(z, mean, log_std, log_det=log_det),
    ),
    "logit": ([X.sigmoid()], lambda f, x: f(x)),
    "quantize": ([X.sigmoid()], lambda f, x: f(x)),
    "hutchinson_trace": ([X, normal(5, 4, seed=5)], lambda f, e, je: f(e, je, **NORM.get(f, {}))),
    "field_divergence": (
        [X, normal(6, 4), normal(4, 6), normal(6), ROW, normal(5, 4, seed=6)],
        lambda f, x, v, w, b, c, e: f(x, [v, w], [b, c], probe=e, regularizers=True),
    ),
    "field_layer": ([X, ROW, ROW], lambda f, p, b, g: f(p, b, g)),
    "relu_network": (
        [X, normal(6, 4), normal(4, 6), normal(6), ROW, normal(5, 6, seed=7)],
        lambda f, x, v, w, b, c, context: f(x, [v, w], [b, c], context=context),
    ),
    "autoregressive_inverse": (
        [X, normal(6, 4), normal(8, 6), normal(6), normal(5, 8, seed=8)],
        lambda f, z, v, w, b, c: f(z, [v, w], [b, c], PLAN),
    ),
    "rk_combine": ([X, normal(2, 5, 4), ZERO], lambda f, y, k, h: f(y, k, (0.5, 0.25), h)),
    "rk_error": (
        [X, normal(5, 4, seed=9), normal(2, 5, 4), ZERO],
        lambda f, y, y1, k, h: f(y, y1, k, (0.5, 0.25), h, rtol=1e-3, atol=1e-3),
    ),
}


def mixtures(count):
    if count <= 2:
        return list(itertools.product(DTYPES, repeat=count))
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(len(DTYPES), (24, count), generator=generator).tolist()
    return [tuple(DTYPES[i] for i in row) for row in drawn]


def outcome(call, function, tensors):
    """Return the results, or the error as text."""
    try:
        result = call(function, *tensors)
    except (TypeError, ValueError) as error:
        return repr(error)
    return result if isinstance(result, tuple) else (result,)


@pytest.mark.parametrize("name", CASES)
def test_kernel_and_reference_take_the_same(name):
    _library.require_kernels("cpu")
    tensors, call = CASES[name]
    for dtypes in mixtures(len(tensors)):
        mixed = [t.to(dtype) for t, dtype in zip(tensors, dtypes, strict=True)]
        with use_reference():
            wanted = outcome(call, getattr(ops, name), mixed)
        if isinstance(wanted, str):
            assert outcome(call, getattr(ops, name), mixed) == wanted, dtypes
            continue
        for function in (getattr(ops, name), getattr(ops, name + "_reference")):
            found = outcome(call, function, mixed)
            assert not isinstance(found, str), (dtypes, found)
            assert [t.dtype for t in found] == [t.dtype for t in wanted], dtypes
            for a, b in zip(found, wanted, strict=True):
                # both round to the dtype of the result, from float32 at least: one rounding of the coarsest
                half = {torch.bfloat16: 2**-7, torch.float16: 2**-10}.get(a.dtype, 2e-5)
                tolerance = 0 if a.dtype == torch.uint8 else half
                torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)


def test_every_function_with_a_reference_is_here():
    names = {n.removesuffix("_reference") for n in ops.__all__ if n.endswith("_reference")}
    # dequantize takes bytes alone, and bits_per_dim one tensor, which it multiplies
    assert names - {"dequantize", "bits_per_dim"} == set(CASES)
