"""dequantize, quantize and logit: exactness, noise, log-dets, gradients, layouts, bad input."""

import math

import pytest
import torch

import pyflowkern
from pyflowkern.ops import _philox, dequantize, logit, logit_reference, preprocess, quantize

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
G = torch.Generator()
ALPHAS = [None, 0.0, 1e-6, 0.05, 0.3, 0.49]
SIZES = [1, 3, 127, 129, 1000]


def bytes_like(*shape, bits=8, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.randint(0, 2**bits, shape, generator=g, device="cpu").to(torch.uint8)
    return x.to(torch.get_default_device())


def unit(*shape, dtype=torch.float64, seed=0):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g, dtype=torch.float64, device="cpu").to(dtype)
    return x.to(torch.get_default_device())


def layouts(x):
    """The same values under other strides (x: [N, C, H, W])."""
    yield x.to(memory_format=torch.channels_last)
    yield torch.stack((x, x), -1)[..., 0]
    yield x.transpose(2, 3).contiguous().transpose(2, 3)


# --- Philox --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("counter", "key", "words"),
    [  # the known answers of Salmon et al.'s Random123 for philox4x32-7
        ([0] * 4, 0, [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]),
        ([0xFFFFFFFF] * 4, -1, [0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            0x299F31D0A4093822,
            [0x4DFCCABA, 0x190A87F0, 0xC47362BA, 0xB6B5242A],
        ),
    ],
)
def test_philox_known_answers(counter, key, words):
    assert _philox.philox_blocks(torch.tensor(key), torch.tensor(counter)).tolist() == words


# --- dequantize and quantize ---------------------------------------------------------------------


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("alpha", [None, 0.05])
def test_dequantize_matches_reference(backend, alpha, size):
    for bits in (8, 5, 1):
        x = bytes_like(5, size, bits=bits)
        y, log_det = dequantize(x, bits=bits, alpha=alpha, seed=size)
        expected, expected_log_det = preprocess.dequantize_reference(
            x, bits=bits, alpha=alpha, seed=size
        )
        if alpha is None:
            assert torch.equal(y, expected)
        # both round p and q once and take logarithms good to an ulp or two
        torch.testing.assert_close(y, expected, rtol=1e-6, atol=5e-7)
        torch.testing.assert_close(log_det, expected_log_det, rtol=1e-6, atol=1e-5)


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_noise_is_philox_of_the_index(backend, seed):
    x = torch.zeros(3, 1001, dtype=torch.uint8)
    y, log_det = dequantize(x, seed=seed)
    noise = _philox.philox_uint16(torch.tensor(seed), x.numel()).view(x.shape)
    assert torch.equal(y, (noise.double() / 2**24).float())
    torch.testing.assert_close(log_det, torch.full((3,), -1001 * 8 * math.log(2)))


@pytest.mark.parametrize("alpha", ALPHAS)
@pytest.mark.parametrize("bits", [8, 5, 1])
def test_round_trip_is_exact(backend, alpha, bits):
    """Every level, with 65,536 / 2 noises each over eight seeds, comes back as it was."""
    x = (torch.arange(256, dtype=torch.int16) % 2**bits).to(torch.uint8).repeat(512, 1)
    for seed in range(8):
        y, _ = dequantize(x, bits=bits, alpha=alpha, seed=seed)
        assert torch.equal(quantize(y, bits=bits, alpha=alpha), x)


@pytest.mark.parametrize("alpha", [0.0, 0.05, 0.3])
def test_round_trip_at_the_edges_of_every_level(backend, alpha):
    """The least and the greatest noise that may be drawn, for all levels."""
    edge = preprocess._edge_steps(8, alpha)
    for noise in (edge, 2**16 - 1 - edge):
        v = (torch.arange(256) * 2**16 + noise).float() / 2**24
        y, _ = logit(v[None], alpha=alpha)
        assert torch.equal(quantize(y[0], alpha=alpha), torch.arange(256, dtype=torch.uint8))


def test_output_stays_below_one(backend):
    x = torch.full((64, 4096), 255, dtype=torch.uint8)
    y, _ = dequantize(x, seed=5)
    assert y.max() < 1
    assert y.min() >= 255 / 256


def test_noise_is_uniform(backend):
    """Chi-square over 256 cells of 2^20 draws: within four standard deviations of its mean."""
    y, _ = dequantize(torch.zeros(256, 4096, dtype=torch.uint8), seed=7)
    u = (y * 256).flatten()
    counts = torch.histc(u, 256, 0.0, 1.0)
    chi2 = ((counts - 4096) ** 2 / 4096).sum().item()
    assert abs(chi2 - 255) < 4 * math.sqrt(2 * 255)
    # Kolmogorov-Smirnov: 1.95 / sqrt(n) is the 0.1 % level
    u = u.double().sort().values
    gap = (u - (torch.arange(u.numel()) + 0.5) / u.numel()).abs().max().item()
    assert gap < 1.95 / math.sqrt(u.numel())
    pairs = (y * 256)[:, ::2].flatten() - 0.5, (y * 256)[:, 1::2].flatten() - 0.5
    correlation = (pairs[0] * pairs[1]).mean().item() * 12
    assert abs(correlation) < 4 / math.sqrt(pairs[0].numel())


def test_layouts_give_the_same_noise(backend):
    x = bytes_like(3, 5, 9, 7)
    for alpha in (None, 0.05):
        y, log_det = dequantize(x, alpha=alpha, seed=3)
        for other in layouts(x):
            y2, log_det2 = dequantize(other, alpha=alpha, seed=3)
            assert torch.equal(y2, y)
            torch.testing.assert_close(log_det2, log_det, rtol=1e-6, atol=1e-4)
            assert torch.equal(quantize(y2, alpha=alpha), x)


def test_empty_scalar_and_expanded(backend):
    for shape in ((0, 3, 4, 4), (3, 0), (0,), (4,)):
        for alpha in (None, 0.05):
            x = bytes_like(*shape)
            y, log_det = dequantize(x, alpha=alpha, seed=0)
            assert y.shape == x.shape
            assert log_det.shape == shape[:1]
            assert torch.equal(quantize(y, alpha=alpha), x)
    x = bytes_like(1, 7).expand(5, 7)
    assert torch.equal(dequantize(x, seed=1)[0], dequantize(x.contiguous(), seed=1)[0])


def test_seed_follows_the_generator(backend):
    x = bytes_like(4, 33)
    torch.manual_seed(0)
    first, second = dequantize(x)[0], dequantize(x)[0]
    torch.manual_seed(0)
    assert torch.equal(dequantize(x)[0], first)
    assert not torch.equal(first, second)
    drawn = [dequantize(x, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*drawn)


def test_threads_do_not_matter(backend):
    x, v = bytes_like(7, 3, 45, 41), unit(5, 40_000, dtype=torch.float32)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        y, log_det = dequantize(x, alpha=0.05, seed=3)
        results.append((y, log_det, *logit(v, alpha=0.1)))
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [3, 129, 700, 2000, 40_000])
def test_log_det_does_not_depend_on_the_place_in_the_batch(backend, size):
    v = unit(40, size, dtype=torch.float32)
    for inverse in (False, True):
        whole, part = logit(v, inverse=inverse)[1], logit(v[31:], inverse=inverse)[1]
        assert torch.equal(whole[31:], part)


def test_bytes_beyond_the_bits_do_no_harm(backend):
    """On a GPU nobody may look for them before the kernel; on the CPU the public function refuses them."""
    x = torch.full((2, 65), 255, dtype=torch.uint8)
    key = torch.tensor(0)
    for alpha in (None, 0.05):
        y, log_det = torch.ops.pyflowkern.dequantize(x, key, 3, alpha)
        assert y.shape == x.shape
        assert log_det.shape == (2,)


@pytest.mark.parametrize("dtype", FLOATS)
def test_quantize_limits(backend, dtype):
    inf = math.inf
    y = torch.tensor([-inf, -1.0, 0.0, 0.25, 0.5, 0.9375, 1.0, inf, math.nan] * 5, dtype=dtype)
    expected = torch.tensor([0, 0, 0, 64, 128, 240, 255, 255, 0] * 5, dtype=torch.uint8)
    assert torch.equal(quantize(y), expected)
    assert torch.equal(quantize(y, bits=4), expected >> 4)
    assert torch.equal(
        quantize(torch.tensor([-inf, 0, inf, math.nan], dtype=dtype), alpha=0.05),
        torch.tensor([0, 128, 255, 0], dtype=torch.uint8),
    )


# --- logit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inverse", [False, True])
@pytest.mark.parametrize("size", SIZES)
def test_logit_matches_float64(backend, size, inverse, dtype):
    for alpha in (0.0, 0.05):
        x = unit(4, size, dtype=dtype, seed=size)
        if inverse:
            x = 8 * x - 4
        y, log_det = logit(x, alpha=alpha, inverse=inverse)
        exact, exact_log_det = logit_reference(x.double(), alpha=alpha, inverse=inverse)
        plain, plain_log_det = logit_reference(x, alpha=alpha, inverse=inverse)
        eps = torch.finfo(dtype).eps
        assert y.dtype == dtype
        assert log_det.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        finite = exact.isfinite()
        error, plain_error = ((t.double() - exact)[finite].abs().max() for t in (y, plain))
        # the floor: the roundings of p and q, of two logarithms and of their difference, which for
        # float64, its own reference, is all there is
        assert error <= 2 * plain_error + 2 * eps * (1 + exact[finite].abs().max())
        work = torch.finfo(log_det.dtype).eps
        gaps = [(t.double() - exact_log_det).abs() for t in (log_det, plain_log_det)]
        gap, plain_gap = (t.nan_to_num(0, 0, 0) for t in gaps)
        # each term is off by an ulp or two of its logarithms; the sum rounds once more
        assert bool((gap <= 2 * plain_gap + 4 * work * (size + exact_log_det.abs())).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_logit_is_stable_at_both_ends(backend, dtype):
    tiny = torch.finfo(dtype).tiny
    eps = torch.finfo(dtype).eps
    ends = torch.tensor([tiny, 1e-30, 1e-10, eps, 0.5, 1 - eps, 1 - eps / 2], dtype=dtype)[:, None]
    y, log_det = logit(ends)
    p = ends.double()
    q = 1 - p  # exact from a half on, and 1 to float64's precision below
    torch.testing.assert_close(y.double(), p.log() - q.log(), rtol=4 * eps, atol=4 * eps)
    torch.testing.assert_close(
        log_det.double(), -(p.log() + q.log())[:, 0], rtol=4 * eps, atol=4 * eps
    )
    inf = math.inf
    y, log_det = logit(torch.tensor([[0.0], [1.0], [-0.1], [1.1], [math.nan]], dtype=dtype))
    assert y[:2, 0].tolist() == [-inf, inf]
    assert log_det[:2].tolist() == [inf, inf]
    assert y[2:].isnan().all()
    assert log_det[2:].isnan().all()
    x, log_det = logit(torch.tensor([[-inf], [inf]], dtype=dtype), inverse=True)
    assert x[:, 0].tolist() == [0, 1]
    assert log_det.tolist() == [-inf, -inf]


def test_logit_inverts(backend):
    x = unit(6, 129, dtype=torch.float32)
    for alpha in (0.0, 0.05, 0.4):
        y, log_det = logit(x, alpha=alpha)
        back, log_det_back = logit(y, alpha=alpha, inverse=True)
        # rounding y moves p by p q eps |y| <= eps / 4, and x by 1 / (1 - 2 alpha) of that
        torch.testing.assert_close(back, x, rtol=0, atol=1e-6 / (1 - 2 * alpha))
        torch.testing.assert_close(log_det_back, -log_det, rtol=1e-5, atol=1e-3)


@pytest.mark.parametrize("inverse", [False, True])
def test_logit_log_det_is_that_of_the_jacobian(backend, inverse):
    x = unit(3, 5) * 0.9 + 0.05
    _, log_det = logit(x, alpha=0.03, inverse=inverse)
    for row, value in zip(x, log_det, strict=True):
        jacobian = torch.autograd.functional.jacobian(
            lambda v: logit(v[None], alpha=0.03, inverse=inverse)[0][0], row
        )
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], value)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("inverse", [False, True])
def test_logit_gradient(backend, inverse, dtype):
    x = (unit(4, 3, 11, 5, dtype=torch.float64) * 0.9 + 0.05).to(dtype)
    g, h = unit(4, 3, 11, 5, seed=1).to(dtype) - 0.5, unit(4, seed=2)
    for layout in (x, *layouts(x)):
        grads = []
        for f, v in ((logit, layout), (logit_reference, x.double())):
            v = v.detach().clone(memory_format=torch.preserve_format).requires_grad_()
            y, log_det = f(v, alpha=0.05, inverse=inverse)
            torch.autograd.backward((y, log_det), (g.to(y.dtype), h.to(log_det.dtype)))
            grads.append(v.grad)
        eps = torch.finfo(dtype).eps
        assert grads[0].dtype == dtype
        # a dozen roundings, and p - q and q - p cancel: measured against the largest gradient
        gap = (grads[0].double() - grads[1]).abs().max()
        assert gap <= 8 * eps * grads[1].abs().max()


@pytest.mark.parametrize("inverse", [False, True])
def test_logit_gradcheck(backend, inverse):
    x = (unit(3, 7) * 0.8 + 0.1).requires_grad_()

    def f(v):
        return logit(v, alpha=0.05, inverse=inverse)

    assert torch.autograd.gradcheck(f, (x,))
    assert torch.autograd.gradgradcheck(f, (x,))


def test_bad_rows_stay_where_they_are(backend):
    x = unit(5, 33, dtype=torch.float32)
    good, good_log_det = logit(x)
    x[2, 7] = math.nan
    y, log_det = logit(x)
    rows = torch.tensor([0, 1, 3, 4])
    assert torch.equal(y[rows], good[rows])
    assert torch.equal(log_det[rows], good_log_det[rows])
    assert log_det[2].isnan()


# --- torch's own checks, bad input ---------------------------------------------------------------


def test_opcheck(backend):
    if not preprocess.kernel_serves("logit", torch.ones(1)):
        pytest.skip("the reference has no op")
    ops = torch.ops.pyflowkern
    for x in (
        bytes_like(3, 4, 5, 6),
        bytes_like(3, 4, 5, 6).to(memory_format=torch.channels_last),
    ):
        for alpha in (None, 0.05):
            torch.library.opcheck(ops.dequantize.default, (x, torch.tensor(3), 8, alpha))
            torch.library.opcheck(ops.quantize.default, (x / 256, 8, alpha))
        v = (x.float() / 300 + 0.1).requires_grad_()
        for inverse in (False, True):
            torch.library.opcheck(ops.logit.default, (v, 0.05, inverse))
            args = (v.detach(), torch.ones(3), v.detach(), 0.05, inverse)
            torch.library.opcheck(ops.logit_backward.default, args)


@pytest.mark.slow
def test_compiles_into_one_graph(backend):
    def f(x, v):
        y, log_det = dequantize(x, alpha=0.05)
        z, more = logit(v, alpha=0.1)
        return y, log_det, quantize(y, alpha=0.05), z, more

    x, v = bytes_like(4, 6), unit(4, 6, dtype=torch.float32).requires_grad_()
    out = torch.compile(f, fullgraph=True)(x, v)
    assert torch.equal(out[2], x)
    torch.testing.assert_close(out[3], logit(v, alpha=0.1)[0])
    out[4].sum().backward()
    assert v.grad.isfinite().all()


def test_functional_transforms_take_the_reference(backend):
    x = unit(3, 4)
    jacobian = torch.func.vmap(torch.func.jacrev(lambda v: logit(v[None])[0][0]))(x)
    torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], logit(x)[1])


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: dequantize(torch.zeros(2, 3)), TypeError, "uint8"),
        (lambda: dequantize([1, 2]), TypeError, "Tensor"),
        (lambda: dequantize(bytes_like()), ValueError, "batch"),
        (lambda: dequantize(bytes_like(2), bits=0), ValueError, "bits"),
        (lambda: dequantize(bytes_like(2), bits=9), ValueError, "bits"),
        (lambda: dequantize(bytes_like(2), bits=4.0), TypeError, "bits"),
        (lambda: dequantize(bytes_like(2), alpha=0.5), ValueError, "alpha"),
        (lambda: dequantize(bytes_like(2), alpha="x"), TypeError, "alpha"),
        (lambda: dequantize(bytes_like(2), seed=1.5), TypeError, "seed"),
        (lambda: dequantize(bytes_like(2), seed=2**63), ValueError, "int64"),
        (lambda: dequantize(bytes_like(2), generator=3), TypeError, "generator"),
        (
            lambda: dequantize(bytes_like(2), seed=1, generator=G),
            ValueError,
            "both",
        ),
        (lambda: quantize(bytes_like(2)), TypeError, "floating"),
        (lambda: quantize(torch.zeros(2), alpha=math.nan), ValueError, "alpha"),
        (lambda: logit(bytes_like(2)), TypeError, "floating"),
        (lambda: logit(torch.tensor(0.5)), ValueError, "batch"),
        (lambda: logit(torch.zeros(2), alpha=-0.1), ValueError, "alpha"),
    ],
)
def test_bad_input(backend, call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_public_names():
    assert set(preprocess.__all__) <= set(pyflowkern.ops.__all__)
