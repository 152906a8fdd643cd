"""The SIMD elementary functions, in units in the last place against extended precision."""

import ctypes

import numpy as np
import pytest

from pyflowkern import _library

LIMITS = {  # ulp: the errors of the polynomial and of the operations after it
    "exp": 1.5,
    "expm1": 4.0,
    "log": 1.5,
    "log1p": 2.0,
    "atan": 3.5,
    "tanh": 3.5,
    "sech2": 5.0,
    "sigmoid": 2.5,
    "softplus": 2.5,
    "floor": 0.0,
    "sqrt": 0.5,
    "log of normal numbers": 1.5,
    "sin of an eighth of a turn": 1.5,
    "cos of an eighth of a turn": 1.5,
    "asinh": 2.5,
}
#: Those of which some arguments have results without meaning.
NARROW = ("log of normal numbers", "sin of an eighth of a turn", "cos of an eighth of a turn")
wide = np.longdouble
EXACT = {
    "exp": np.exp,
    "expm1": np.expm1,
    "log": np.log,
    "log1p": np.log1p,
    "atan": np.arctan,
    "tanh": np.tanh,
    "sech2": lambda x: 1 / np.cosh(x) ** 2,
    "sigmoid": lambda x: 1 / (1 + np.exp(-x)),
    "softplus": lambda x: np.logaddexp(wide(0), x),
    "floor": np.floor,
    "sqrt": np.sqrt,
    "log of normal numbers": np.log,
    "sin of an eighth of a turn": np.sin,
    "cos of an eighth of a turn": np.cos,
    "asinh": np.arcsinh,
}


def simd(name, x):
    library = ctypes.CDLL(str(_library._loaded["cpu"]))
    function = (
        library.pyflowkern_math_f32 if x.dtype == np.float32 else library.pyflowkern_math_f64
    )
    y = np.empty_like(x)
    pointer = ctypes.c_void_p
    function(
        list(LIMITS).index(name),
        x.ctypes.data_as(pointer),
        y.ctypes.data_as(pointer),
        ctypes.c_int64(x.size),
    )
    return y


@pytest.fixture(params=_library.SIMD_LEVELS)
def level(request):
    before = _library.simd_level()
    try:
        if _library.simd_level(request.param) != request.param:
            pytest.skip(f"this processor lacks {request.param}")
        yield request.param
    finally:
        _library.simd_level(before)


def arguments(name, dtype):
    """Ordinary numbers, numbers near zero, and numbers over the whole range."""
    rng = np.random.default_rng(0)
    sign = rng.choice([-1, 1], 20_001)
    x = np.concatenate(
        [
            3 * rng.normal(size=100_001),
            rng.uniform(-1, 1, 50_000),
            np.exp(8 * rng.normal(size=20_001)) * sign,
        ]
    ).astype(dtype)
    if name in ("log", "sqrt"):
        return np.abs(x)
    if name == "log of normal numbers":
        return np.abs(x)[np.abs(x) >= np.finfo(dtype).tiny]
    if name in NARROW:
        return x[np.abs(x) <= np.pi / 4]
    if name == "log1p":
        return x[x > -1]
    top = 87 if dtype == np.float32 else 708
    return x[x < top] if name == "expm1" else x[np.abs(x) < 40] if name == "sech2" else x


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", LIMITS)
def test_accuracy(level, name, dtype):
    x = arguments(name, dtype)
    with np.errstate(all="ignore"):
        exact = EXACT[name](x.astype(wide))
        rounded = exact.astype(dtype)
    y = simd(name, x)
    normal = np.isfinite(rounded) & (np.abs(rounded) > np.finfo(dtype).tiny)
    ulp = np.abs(y.astype(wide) - exact)[normal] / np.spacing(np.abs(rounded[normal])).astype(wide)
    assert ulp.max() <= LIMITS[name], f"{float(ulp.max()):.2f} ulp at {x[normal][ulp.argmax()]}"
    infinite = np.isinf(rounded)
    assert np.array_equal(y[infinite], rounded[infinite])


@pytest.mark.parametrize("dtype", [np.float32, np.float64])
@pytest.mark.parametrize("name", [name for name in LIMITS if name not in NARROW])
def test_special_arguments(level, name, dtype):
    """NaN, infinities, signed zeros and subnormal numbers."""
    x = np.array([np.nan, np.inf, -np.inf, 0.0, -0.0, np.finfo(dtype).tiny / 8], dtype)
    with np.errstate(all="ignore"):
        expected = EXACT[name](x.astype(wide)).astype(dtype)
    y = simd(name, x)
    if name == "sech2":
        expected[1:3] = y[1:3]  # constant beyond 43, where it is below 1e-36
        assert (y[1:3] < 1e-36).all()
    np.testing.assert_allclose(y, expected, rtol=4 * np.finfo(dtype).eps, atol=0)


def test_exp_reaches_the_subnormal_numbers(level):
    x = np.linspace(-103, -88, 1000, dtype=np.float32)
    exact = np.exp(x.astype(np.float64))
    assert np.abs(simd("exp", x) - exact).max() <= 2**-149
