"""dequantize, quantize and logit: exactness, noise, log-dets, gradients, layouts, bad input."""

import math

import pytest
import torch
from cases.preprocess import bytes_like
from laws import unit

from pyflowkern.ops import dequantize, logit, philox, preprocess, quantize

G = torch.Generator()


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
    assert philox.philox_blocks(torch.tensor(key), torch.tensor(counter)).tolist() == words


# --- dequantize and quantize ---------------------------------------------------------------------


@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
def test_noise_is_philox_of_the_index(backend, seed):
    x = torch.zeros(3, 1001, dtype=torch.uint8)
    y, log_det = dequantize(x, seed=seed)
    noise = philox.philox_uint16(torch.tensor(seed), x.numel()).view(x.shape)
    assert torch.equal(y, (noise.double() / 2**24).float())
    torch.testing.assert_close(log_det, torch.full((3,), -1001 * 8 * math.log(2)))


@pytest.mark.parametrize("alpha", [None, 0.0, 1e-6, 0.05, 0.3, 0.49])
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


def test_seed_follows_the_generator(backend):
    x = bytes_like(4, 33)
    torch.manual_seed(0)
    first, second = dequantize(x)[0], dequantize(x)[0]
    torch.manual_seed(0)
    assert torch.equal(dequantize(x)[0], first)
    assert not torch.equal(first, second)
    drawn = [dequantize(x, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*drawn)


def test_bytes_beyond_the_bits_do_no_harm(backend):
    """On a GPU nobody may look for them before the kernel; on the CPU the public function refuses them."""
    x = torch.full((2, 65), 255, dtype=torch.uint8)
    key = torch.tensor(0)
    for alpha in (None, 0.05):
        y, log_det = torch.ops.pyflowkern.dequantize(x, key, 3, alpha)
        assert y.shape == x.shape
        assert log_det.shape == (2,)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
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


# --- torch's own checks, bad input ---------------------------------------------------------------


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
