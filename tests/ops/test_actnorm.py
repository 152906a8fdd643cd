"""actnorm and channel_moments: value, gradients, log-det, moments that cancellation cannot spoil."""

import itertools

import pytest
import torch
from laws import jacobian_log_det, law, normal

from pyflowkern.ops import actnorm, actnorm_reference, channel_moments

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
SHAPES = [
    (3, 1),
    (64, 10),
    (127, 3),
    (2, 129),
    (1, 1000),
    (2, 3, 7),
    (7, 6, 8, 8),
    (3, 5, 3, 3),
    (65, 63),  # the last that repeat their constants, and those that do not
    (65, 65),
    (70, 331),
    (2, 97, 3, 3),
    (0, 4, 2, 2),
]


def parameters(x):
    work = torch.float64 if x.dtype == torch.float64 else torch.float32
    return tuple(0.5 * normal(x.shape[1], seed=s, dtype=work) for s in (1, 2))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_value_and_gradients(backend, shape, dtype):
    x = normal(*shape, dtype=dtype)
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    for v, inverse in itertools.product(layouts, (False, True)):
        law(
            lambda *a, inverse=inverse: actnorm(*a, inverse=inverse),
            lambda *a, inverse=inverse: actnorm_reference(*a, inverse=inverse),
            (v, *parameters(x)),
        )


def test_compiled_forward_derivative():
    """Below the compiler too a tangent goes through the reference, as in eager mode."""
    x, (s, b) = normal(3, 4), parameters(normal(3, 4))

    def tangent(v):
        return torch.func.jvp(lambda w: actnorm(w, s, b)[0], (v,), (torch.ones_like(v),))[1]

    compiled = torch.compile(tangent, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(x), tangent(x))
    torch.testing.assert_close(tangent(x), s.exp().expand(3, 4))


def test_log_dets_are_writable():
    """They are running sums in many flows."""
    x = normal(3, 4)
    for function in (actnorm, actnorm_reference):
        _, log_det = function(x, *parameters(x))
        log_det += 1


def test_inverse_undoes_forward(backend):
    x = normal(3, 4, 5, 5)
    y, log_det = actnorm(x, *parameters(x))
    back, minus = actnorm(y, *parameters(x), inverse=True)
    torch.testing.assert_close(back, x, rtol=1e-14, atol=1e-14)
    assert torch.equal(minus, -log_det)


def test_log_det_is_that_of_the_jacobian(backend):
    x = normal(2, 3, 2, 2)
    for inverse in (False, True):
        _, log_det = actnorm(x, *parameters(x), inverse=inverse)
        expected = jacobian_log_det(
            lambda v, inverse=inverse: actnorm(v, *parameters(x), inverse=inverse)[0], x
        )
        torch.testing.assert_close(log_det, expected)


def test_gradgradcheck(backend):
    x, s, b = (
        normal(*shape, seed=i).requires_grad_() for i, shape in enumerate([(2, 3, 2), (3,), (3,)])
    )
    for inverse in (False, True):
        torch.autograd.gradcheck(
            lambda *a, inverse=inverse: actnorm(*a, inverse=inverse), (x, s, b)
        )
        torch.autograd.gradgradcheck(
            lambda *a, inverse=inverse: actnorm(*a, inverse=inverse), (x, s, b)
        )


def test_any_strides(backend):
    base = normal(4, 7, 6, 5, dtype=torch.float32)
    for x in (base[:, 1:5], base.transpose(2, 3), base[:1].expand(3, 7, 6, 5), base[:, :, ::2]):
        for a, b in zip(
            actnorm(x, *parameters(x)), actnorm(x.clone(), *parameters(x)), strict=True
        ):
            torch.testing.assert_close(a, b, rtol=0, atol=0)


def test_bad_sample_stays_alone(backend):
    x = normal(3, 4, 5, dtype=torch.float32)
    good = actnorm(x, *parameters(x))
    x[1] = torch.nan
    y, log_det = actnorm(x, *parameters(x))
    assert torch.equal(y[[0, 2]], good[0][[0, 2]])
    assert torch.equal(log_det, good[1])


@pytest.mark.parametrize("shape", [s for s in SHAPES if s[0] > 0], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
def test_moments_at_any_mean(backend, shape, mean):
    """In float32 the sum of squares of data near 1e4 has no digit of a variance of 1 left: Chan's merging has all."""
    x = (normal(*shape) + mean).float()
    layouts = [x, x.contiguous(memory_format=torch.channels_last)] if x.dim() == 4 else [x]
    axes = [d for d in range(x.dim()) if d != 1]
    variance, average = torch.var_mean(x.double(), axes, correction=0)
    for v in layouts:
        m, s = channel_moments(v)
        torch.testing.assert_close(m.double(), average, rtol=1e-6, atol=1e-6)
        torch.testing.assert_close(s.double(), variance, rtol=1e-3, atol=1e-6)


def test_moments_of_nothing_are_nan():
    assert all(t.isnan().all() for t in channel_moments(torch.zeros(0, 3)))


def test_same_bits_for_any_thread_count():
    threads = torch.get_num_threads()
    for shape in ((64, 8, 32, 32), (20_000, 10)):
        x, results = normal(*shape, dtype=torch.float32), []
        try:
            for n in (1, 2):
                torch.set_num_threads(n)
                leaves = [t.clone().requires_grad_() for t in (x, *parameters(x))]
                y, log_det = actnorm(*leaves)
                grads = torch.autograd.grad((y * y).sum() + log_det.sum(), leaves)
                results.append((y, log_det, *grads[:1], *channel_moments(x)))
        finally:
            torch.set_num_threads(threads)
        assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


def test_opcheck():
    x = normal(2, 3, 4, 4).requires_grad_()
    s, b = (normal(3, seed=i).requires_grad_() for i in (1, 2))
    for inverse in (False, True):
        torch.library.opcheck(torch.ops.pyflowkern.actnorm.default, (x, s, b, inverse))
    torch.library.opcheck(torch.ops.pyflowkern.channel_moments.default, (x.detach(),))


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        ({"x": torch.zeros(2, 3, dtype=torch.int32)}, TypeError, "x must be"),
        ({"x": torch.zeros(3)}, ValueError, "batch axis"),
        (
            {"log_scale": torch.zeros(4)},
            ValueError,
            r"log_scale must have shape \(3,\), got \(4,\)",
        ),
        ({"bias": torch.zeros(3, dtype=torch.int32)}, TypeError, "bias must be"),
    ],
)
def test_bad_arguments(change, error, words):
    arguments = {
        "x": torch.zeros(2, 3),
        "log_scale": torch.zeros(3),
        "bias": torch.zeros(3),
    } | change
    with pytest.raises(error, match=words):
        actnorm(**arguments)
