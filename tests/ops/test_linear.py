"""invertible_linear and glow_step: values, gradients, layouts, determinism, bad input."""

import functools
import math

import pytest
import torch
from laws import normal

import pyflowkern
from pyflowkern.ops import (
    glow_step,
    glow_step_reference,
    invertible_linear,
    invertible_linear_reference,
)

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    *[(1, 1), (3, 3), (129, 2), (5, 127), (2, 129), (1000, 10), (0, 4)],  # vectors, C > 128 too
    *[(2, 1, 127), (3, 12, 1), (2, 7, 129), (3, 48, 9, 3), (2, 128, 3, 3), (2, 4, 3, 2, 5)],
    *[(0, 6, 4, 4), (2, 6, 0)],
]
MAPS = ["linear", "linear without bias", "glow"]


@functools.cache
def matrix(c, inverse, device):
    """A matrix (or its inverse) whose singular values lie around one, and its log-determinant."""
    weight = torch.eye(c).double() + 0.4 / c**0.5 * normal(c, c, seed=1)
    return torch.linalg.inv(weight) if inverse else weight, torch.linalg.slogdet(weight)[1]


def make(kind, shape, dtype=torch.float64, seed=0, inverse=False):
    """x and the parameters in the order of the public function, a well-conditioned matrix."""
    c = shape[1]
    x = normal(*shape, dtype=dtype, seed=seed)
    weight, log_abs_det = (t.to(dtype) for t in matrix(c, inverse, torch.get_default_device()))
    log_scale = 0.5 * normal(c, dtype=dtype, seed=seed + 2)
    bias = normal(c, dtype=dtype, seed=seed + 3)
    if kind == "glow":
        return [x, log_scale, bias, weight, log_abs_det]
    return [x, weight, log_abs_det, bias if kind == "linear" else None]


def functions(kind):
    if kind == "glow":
        return glow_step, glow_step_reference
    return invertible_linear, invertible_linear_reference


def double(args):
    return [None if t is None else t.double() for t in args]


def gap(value, exact):
    return (value.double() - exact).abs().max().item() if exact.numel() else 0.0


def leaves(args):
    return [None if t is None else t.detach().clone().requires_grad_() for t in args]


def gradients(function, args, seed=7, **options):
    """Gradients of a random combination of the outputs."""
    outputs = [t for t in function(*args, **options) if t.requires_grad]
    weights = [normal(*t.shape, dtype=t.dtype, seed=seed) for t in outputs]
    wanted = [t for t in args if t is not None and t.requires_grad]
    return torch.autograd.grad(outputs, wanted, weights)


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype, inverse):
    for kind in MAPS:
        function, reference = functions(kind)
        args = make(kind, shape, dtype, inverse=inverse)
        y, log_det = function(*args, inverse=inverse)
        plain_y, plain_log_det = reference(*args, inverse=inverse)
        exact_y, exact_log_det = reference(*double(args), inverse=inverse)
        assert y.dtype == dtype
        assert y.shape == shape
        assert log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert log_det.shape == shape[:1]
        # the floor: a few roundings of the largest output; of the log-det, one of every summand
        floor = 4 * torch.finfo(dtype).eps * (1 + (exact_y.abs().max().item() if y.numel() else 0))
        assert gap(y, exact_y) <= 2 * gap(plain_y, exact_y) + floor
        floor = 2 * torch.finfo(log_det.dtype).eps * (1 + math.prod(shape[1:]))
        assert gap(log_det, exact_log_det) <= 2 * gap(plain_log_det, exact_log_det) + floor


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_layouts(backend, kind, inverse):
    """Whatever the strides, the same numbers; channels_last in, channels_last out."""
    function, _ = functions(kind)
    x, *parameters = make(kind, (4, 13, 6, 5), torch.float32)
    expected, expected_log_det = function(x, *parameters, inverse=inverse)
    wide = torch.zeros(4, 13, 6, 11)
    wide[..., 1:6] = x
    for layout in (
        x.to(memory_format=torch.channels_last),
        wide[..., 1:6],
        x.transpose(2, 3).contiguous().transpose(2, 3),
    ):
        y, log_det = function(layout, *parameters, inverse=inverse)
        torch.testing.assert_close(y, expected)
        assert torch.equal(log_det, expected_log_det)
    last = x.to(memory_format=torch.channels_last)
    assert function(last, *parameters)[0].is_contiguous(memory_format=torch.channels_last)
    one = x[:1].expand(4, -1, -1, -1)
    y, _ = function(one, *parameters, inverse=inverse)
    torch.testing.assert_close(y, expected[:1].expand_as(y))


@pytest.mark.parametrize("shape", [(64, 12), (4, 12, 5, 5)], ids=str)
def test_bias_cancels_a_large_mean(backend, shape):
    """Data around 1e4 with a bias of -1e4: x + b is exact, so nothing of W (x + b) is lost."""
    args = make("glow", shape, torch.float32)
    args[0] = args[0] + 1e4
    args[2] = torch.full_like(args[2], -1e4)
    y, _ = glow_step(*args)
    exact, _ = glow_step_reference(*double(args))
    # folding the bias into W b would leave errors of 1e4 eps = 1e-3
    assert gap(y, exact) < 1e-5


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("shape", [(129, 10), (2, 7, 129), (2, 48, 5, 5)], ids=str)
def test_inverse_of_forward(backend, kind, shape):
    function, _ = functions(kind)
    for layout in (torch.contiguous_format, torch.channels_last):
        if layout == torch.channels_last and len(shape) != 4:
            continue
        x, *parameters = make(kind, shape, torch.float64)
        x = x.contiguous(memory_format=layout)
        y, log_det = function(x, *parameters)
        at = 2 if kind == "glow" else 0
        parameters[at] = torch.linalg.inv(parameters[at])
        back, inverse_log_det = function(y, *parameters, inverse=True)
        # conditioned like the matrix, whose singular values lie between 0.2 and 2
        torch.testing.assert_close(back, x, rtol=0, atol=1e-12)
        assert torch.equal(inverse_log_det, -log_det)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_log_det_is_that_of_the_jacobian(backend, kind, inverse):
    function, _ = functions(kind)
    for shape in ((1, 5), (1, 3, 2, 2)):
        x, *parameters = make(kind, shape, inverse=inverse)

        def one(x, shape=shape, parameters=parameters):
            return function(x.view(shape), *parameters, inverse=inverse)[0].flatten()

        jacobian = torch.autograd.functional.jacobian(one, x.flatten())
        log_det = function(x, *parameters, inverse=inverse)[1]
        torch.testing.assert_close(log_det[0], torch.linalg.slogdet(jacobian).logabsdet)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_bad_sample_spoils_no_other(backend, bad):
    for shape in ((9, 5), (9, 5, 3), (9, 5, 4, 5)):
        for kind in MAPS:
            function, _ = functions(kind)
            x, *parameters = make(kind, shape, torch.float32)
            expected, _ = function(x, *parameters)
            x[4] = bad
            y, log_det = function(x, *parameters)
            keep = torch.arange(9) != 4
            assert torch.equal(y[keep], expected[keep])
            assert log_det.isfinite().all()
            # nor does it reach their gradients
            x.requires_grad_()
            y, _ = function(x, *parameters)
            (grad,) = torch.autograd.grad(y[keep].sum(), x)
            assert grad[keep].isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_data_with_float_parameters(backend, dtype):
    x, *parameters = make("glow", (4, 12, 3, 3), torch.float32)
    half = x.to(dtype)
    leaf = half.clone().requires_grad_()
    y, log_det = glow_step(leaf, *parameters)
    assert y.dtype == dtype
    assert log_det.dtype == torch.float32
    expected, _ = glow_step_reference(half.float(), *parameters)
    # computed in float32, rounded once
    torch.testing.assert_close(y.float(), expected, rtol=torch.finfo(dtype).eps, atol=1e-5)
    assert torch.autograd.grad(y.sum(), leaf)[0].dtype == dtype


def test_autocast_changes_nothing(backend):
    for kind in MAPS:
        function, _ = functions(kind)
        args = make(kind, (4, 12, 3, 3), torch.float32)
        expected, expected_log_det = function(*args)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            y, log_det = function(*args)
        assert torch.equal(y, expected)
        assert torch.equal(log_det, expected_log_det)


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_gradients_match_float64(backend, shape, dtype, inverse):
    for kind in MAPS:
        function, reference = functions(kind)
        args = make(kind, shape, dtype, inverse=inverse)
        found = gradients(function, leaves(args), inverse=inverse)
        plain = gradients(reference, leaves(args), inverse=inverse)
        exact = gradients(reference, leaves(double(args)), inverse=inverse)
        for f, p, e in zip(found, plain, exact, strict=True):
            assert f.dtype == p.dtype
            # the floor: a rounding of the result, and of the upstream gradients for half data;
            # float64 has nothing exacter beside it, only sums of 128 terms in another order
            roundings = 16 if dtype == torch.float64 else 4
            largest = e.abs().max().item() if e.numel() else 0
            floor = roundings * torch.finfo(dtype).eps * (1 + largest)
            assert gap(f, e) <= 2 * gap(p, e) + floor


def test_gradients_of_channels_last(backend):
    for kind in MAPS:
        function, reference = functions(kind)
        for inverse in (False, True):
            args = make(kind, (3, 17, 6, 7), inverse=inverse)
            args[0] = args[0].to(memory_format=torch.channels_last)
            found = gradients(function, leaves(args), inverse=inverse)
            exact = gradients(reference, leaves(args), inverse=inverse)
            for f, e in zip(found, exact, strict=True):
                torch.testing.assert_close(f, e)


def test_gradients_of_a_large_mean(backend):
    args = make("glow", (32, 12, 8, 8), torch.float32)
    args[0] = args[0] + 1e4
    args[2] = torch.full_like(args[2], -1e4)
    found = gradients(glow_step, leaves(args))
    exact = gradients(glow_step_reference, leaves(double(args)))
    for f, e in zip(found, exact, strict=True):
        torch.testing.assert_close(f.double(), e, rtol=1e-5, atol=1e-4)


def test_gradients_that_are_not_needed(backend):
    """Every subset of inputs that require a gradient gets the same values."""
    args = make("glow", (4, 5, 3, 3))
    everything = gradients(glow_step, leaves(args))
    for i, expected in enumerate(everything):
        some = list(args)
        some[i] = some[i].clone().requires_grad_()
        (found,) = gradients(glow_step, some)
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("kind", MAPS)
@pytest.mark.parametrize("inverse", [False, True])
def test_gradcheck(backend, kind, inverse):
    function, _ = functions(kind)
    for shape in ((3, 4), (2, 3, 2, 2)):
        args = leaves(make(kind, shape, inverse=inverse))
        wrapped = lambda *a: function(*a, inverse=inverse)  # noqa: E731
        assert torch.autograd.gradcheck(wrapped, args)
        assert torch.autograd.gradgradcheck(wrapped, args)


# --- determinism, integration, bad input ---------------------------------------------------------


@pytest.mark.parametrize("kind", ["linear", "glow"])
def test_same_bits_for_any_thread_count(backend, kind):
    function, _ = functions(kind)
    for shape in ((3000, 10), (9, 24, 16, 16)):
        args = make(kind, shape, torch.float32)
        results = []
        before = torch.get_num_threads()
        try:
            for threads in (1, 2, 3, 1):
                torch.set_num_threads(threads)
                results.append([*function(*args), *gradients(function, leaves(args))])
        finally:
            torch.set_num_threads(before)
        if not pyflowkern.ops.linear.kernel_serves("linear_mix", args[0]):
            continue  # torch's own products promise less
        for other in results[1:]:
            assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("kind", MAPS)
def test_opcheck(kind):
    if not pyflowkern.ops.linear.kernel_serves("linear_mix", torch.ones(1)):
        pytest.skip("linear_mix has no kernel in this build")
    for layout in (torch.contiguous_format, torch.channels_last):
        x, *rest = make(kind, (2, 3, 4, 5), torch.float32)
        x = x.contiguous(memory_format=layout)
        if kind == "glow":
            log_scale, bias, weight, log_abs_det = rest
        else:
            (weight, log_abs_det, bias), log_scale = rest, None
        args = (*leaves([x, weight, log_abs_det, log_scale, bias]), False)
        torch.library.opcheck(torch.ops.pyflowkern.linear_mix.default, args)


@pytest.mark.slow
def test_compile(backend):
    args = make("glow", (4, 6, 5, 5), torch.float32)

    def step(*args):
        y, log_det = glow_step(*args)
        z, more = invertible_linear(y, args[3], args[4], inverse=True)
        return z, log_det + more

    compiled = torch.compile(step, fullgraph=True)
    for a, b in zip(compiled(*args), step(*args), strict=True):
        torch.testing.assert_close(a, b)
    for a, b in zip(gradients(compiled, leaves(args)), gradients(step, leaves(args)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_vmap_runs_the_reference(backend):
    x, *parameters = make("linear", (3, 4, 5, 6))
    batched = torch.vmap(lambda x: invertible_linear(x, *parameters))(x.unsqueeze(0))
    torch.testing.assert_close(batched[0][0], invertible_linear(x, *parameters)[0])


@pytest.mark.parametrize(
    ("change", "error", "match"),
    [
        ({"x": torch.ones(3)}, ValueError, "x must have a batch axis"),
        ({"x": torch.ones(2, 3, dtype=torch.int64)}, TypeError, "x must be a floating-point"),
        ({"weight": torch.ones(3, 4)}, ValueError, r"weight must have shape \(3, 3\)"),
        ({"weight": torch.ones(3, 3, dtype=torch.int64)}, TypeError, "weight must be"),
        ({"weight": 1.0}, TypeError, "weight must be a torch.Tensor"),
        ({"log_abs_det": torch.ones(2)}, ValueError, r"log_abs_det must have shape \(\)"),
        ({"bias": torch.ones(2)}, ValueError, r"bias must have shape \(3,\)"),
        ({"log_scale": torch.ones(3, 1)}, ValueError, r"log_scale must have shape \(3,\)"),
        ({"bias": torch.ones(3, device="meta")}, ValueError, "one device"),
    ],
)
def test_bad_input(backend, change, error, match):
    args = {
        "x": torch.ones(2, 3),
        "log_scale": torch.zeros(3),
        "bias": torch.zeros(3),
        "weight": torch.eye(3),
        "log_abs_det": torch.tensor(0.0),
        **change,
    }
    with pytest.raises(error, match=match):
        glow_step(**args)
    if "log_scale" not in change:
        del args["log_scale"]
        with pytest.raises(error, match=match):
            invertible_linear(**args)
