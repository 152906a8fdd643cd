"""euler_maruyama and add_noise: the noise and its law, steps, seeds, and what is refused."""

import math

import pytest
import torch

from pyflowkern.ops import add_noise, draw_probe, euler_maruyama
from pyflowkern.ops.philox import philox_blocks, philox_normals

F64 = torch.float64
both = pytest.mark.parametrize("dtype", [torch.float32, F64])


def noise(*shape, dtype=torch.float32, **options):
    return add_noise(torch.zeros(shape, dtype=dtype), 1.0, **({"seed": 3} | options))


# --- the noise --------------------------------------------------------------------------------------


@both
@pytest.mark.parametrize("seed", [0, -1, 2**62 + 12345])
@pytest.mark.parametrize("index", [0, 7, 2**32 + 1])
def test_the_noise_is_that_of_the_formula(backend, dtype, seed, index):
    """Written again with complex numbers: the root of -2 log u, turned by an angle."""
    z = noise(1001, dtype=dtype, seed=seed, index=index)
    blocks = torch.arange(251)
    counters = torch.stack(
        [blocks, 0 * blocks, 0 * blocks + index % 2**32, 0 * blocks + index // 2**32], 1
    )
    words = philox_blocks(torch.tensor(seed), counters).double()
    u = (torch.floor(words[:, ::2] / 2) + 0.5) / 2**31
    turned = torch.polar((-2 * u.log()).sqrt(), 2 * math.pi * words[:, 1::2] / 2**32)
    wanted = torch.view_as_real(turned).flatten()[:1001]
    # in float32 a radius near 0 is that of u rounded to 24 bits
    atol = 5e-6 if dtype == torch.float32 else 1e-14
    torch.testing.assert_close(z.double(), wanted, rtol=1e-6 if atol > 1e-9 else 1e-14, atol=atol)


@both
def test_the_ends_of_the_words(backend, dtype):
    """Blocks of seed 0 that were searched for: one of the smallest numbers u, 46.5 / 2^31, and one of the largest."""
    large = noise(4, dtype=dtype, seed=0, index=4049916)[:2]
    assert float(large.norm()) == pytest.approx(math.sqrt(-2 * math.log(46.5 / 2**31)), rel=1e-6)
    small = noise(4, dtype=dtype, seed=0, index=26365365)[2:]
    radius = math.sqrt(2 * 29.5 / 2**31) if dtype == F64 else 0.0  # in float32 u is 1
    assert float(small.norm()) == pytest.approx(radius, rel=1e-6, abs=1e-12)


@both
def test_the_noise_is_normal(backend, dtype):
    """Kolmogorov-Smirnov at the 0.1 % level, moments, tails, and no correlation of neighbours, over 2^20 numbers."""
    z = noise(1024, 1024, dtype=dtype).double()
    n = z.numel()
    u = torch.special.ndtr(z.flatten()).sort().values
    assert float((u - (torch.arange(n) + 0.5) / n).abs().max()) < 1.95 / n**0.5
    for power, moment, variance in ((1, 0, 1), (2, 1, 2), (3, 0, 15), (4, 3, 96), (6, 15, 10170)):
        assert abs(float((z**power).mean()) - moment) < 4.5 * (variance / n) ** 0.5
    beyond = float((z.abs() > 4).double().mean())
    assert beyond == pytest.approx(math.erfc(4 / 2**0.5), rel=0.5)
    for shift in (1, 2, 3, 4, 1024):
        pairs = z.flatten()[:-shift] * z.flatten()[shift:]
        squares = (z.flatten()[:-shift] ** 2 - 1) * (z.flatten()[shift:] ** 2 - 1)
        assert abs(float(pairs.mean())) < 4.5 / n**0.5
        assert abs(float(squares.mean())) < 4.5 * 2 / n**0.5


def test_steps_and_seeds_have_noise_of_their_own(backend):
    drawn = [
        noise(40_000, seed=s, index=i) for s, i in ((0, 0), (0, 1), (1, 0), (0, 2**32), (2**32, 0))
    ]
    correlation = torch.corrcoef(torch.stack(drawn)) - torch.eye(len(drawn))
    assert float(correlation.abs().max()) < 4.5 / 200


def test_the_noise_is_that_of_the_place(backend):
    """Of any size, shape and layout, and of both dtypes but for rounding."""
    long = noise(5000)
    for n in (1, 3, 4, 63, 1023, 1025, 4099):
        assert torch.equal(noise(n), long[:n])
    assert torch.equal(noise(50, 100), long.view(50, 100))
    x = torch.zeros(100, 50).mT
    assert torch.equal(add_noise(x, 1.0, seed=3), long.view(50, 100))
    torch.testing.assert_close(noise(5000, dtype=F64).float(), long, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_every_level_and_number_of_threads_has_the_noise_of_the_reference(backend, threads):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(threads)
        z = noise(60_001, index=2)
    finally:
        torch.set_num_threads(before)
    wanted = philox_normals(torch.tensor(3), 2, 60_001, torch.float32)
    torch.testing.assert_close(z, wanted, rtol=1e-6, atol=1e-6)


# --- steps ------------------------------------------------------------------------------------------


@both
def test_steps_by_hand(backend, dtype):
    x, u, v = (torch.randn(3, 7, dtype=dtype) for _ in range(3))
    for h in (0.09, -0.09, 0.0):
        options = {"index": 4, "seed": 5}
        moved = add_noise(x, 2 * abs(h) ** 0.5, **options)
        euler = euler_maruyama(x, u, h, 2.0, **options)
        heun = euler_maruyama(x, u, h, 2.0, other=v, **options)
        torch.testing.assert_close(euler, moved + h * u)
        torch.testing.assert_close(heun, moved + h / 2 * (u + v))


def test_without_volatility_a_step_is_eulers(backend):
    x, u = torch.randn(5), torch.randn(5)
    torch.testing.assert_close(euler_maruyama(x, u, 0.1, 0.0, seed=1), x + 0.1 * u)


def test_the_process_of_ornstein_and_uhlenbeck_has_its_variance(backend):
    """A linear drift keeps Gaussians: after k steps the variance is a sum of powers."""
    x, h, sigma = torch.zeros(60_000), 0.2, 0.8
    for k in range(12):
        x = euler_maruyama(x, -x, h, sigma, index=k, seed=9)
    kept = (1 - h) ** 2
    variance = sigma**2 * h * (1 - kept**12) / (1 - kept)
    assert float(x.var()) == pytest.approx(variance, rel=4.5 * (2 / 60_000) ** 0.5)
    assert abs(float(x.mean())) < 4.5 * (variance / 60_000) ** 0.5


def test_gradients(backend):
    x, u, v = (torch.randn(3, 2, dtype=F64, requires_grad=True) for _ in range(3))
    g = torch.randn(3, 2, dtype=F64)
    out = euler_maruyama(x, u, -0.4, 1.0, other=v, seed=1)
    found = torch.autograd.grad(out, (x, u, v), g)
    for a, b in zip(found, (g, -0.2 * g, -0.2 * g), strict=True):
        torch.testing.assert_close(a, b)


# --- seeds ------------------------------------------------------------------------------------------


def test_the_seed_follows_the_generator(backend):
    torch.manual_seed(0)
    first, second = noise(33, seed=None), noise(33, seed=None)
    torch.manual_seed(0)
    assert torch.equal(noise(33, seed=None), first)
    assert not torch.equal(first, second)
    drawn = [noise(33, seed=None, generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*drawn)


def test_a_seed_may_be_a_tensor(backend):
    assert torch.equal(noise(9, seed=torch.tensor(3)), noise(9, seed=3))
    seed = draw_probe(torch.zeros(2, 2), generator=torch.Generator().manual_seed(1))
    assert torch.equal(noise(9, seed=seed), noise(9, seed=int(seed)))


# --- bad input --------------------------------------------------------------------------------------


def step(**changed):
    x = torch.zeros(4, 3)
    return euler_maruyama(**({"x": x, "drift": x, "step": 0.1, "sigma": 1.0, "seed": 1} | changed))


@pytest.mark.parametrize(
    ("call", "kind", "match"),
    [
        (lambda: step(x=torch.zeros(4, 3, dtype=torch.int64)), TypeError, "x must be a float"),
        (lambda: step(drift=None), TypeError, "drift must be a torch.Tensor"),
        (lambda: step(drift=torch.zeros(3, 4)), ValueError, "drift must have the shape of x"),
        (lambda: step(other=torch.zeros(4, 3).double()), TypeError, "other must have the dtype"),
        (lambda: step(step=math.inf), ValueError, "step must be finite"),
        (lambda: step(step="1"), TypeError, "step must be a number"),
        (lambda: step(sigma=-1.0), ValueError, "sigma must be at least 0"),
        (lambda: step(sigma=math.nan), ValueError, "sigma must be finite"),
        (lambda: step(index=-1), ValueError, "index must be at least 0"),
        (lambda: step(index=1.0), TypeError, "index must be"),
        (lambda: step(index=2**63), ValueError, "index must fit into int64"),
        (lambda: step(seed=1.5), TypeError, "seed must be an int"),
        (lambda: step(seed=torch.zeros(())), TypeError, "seed must be an int or a dense int64"),
        (lambda: step(seed=torch.zeros(1, dtype=torch.int64)), ValueError, "no axes"),
        (lambda: step(generator=torch.Generator()), ValueError, "not both"),
        (lambda: add_noise(torch.zeros(2), math.nan, seed=1), ValueError, "scale must be finite"),
        (lambda: add_noise([0.0], 1.0), TypeError, "x must be a torch.Tensor"),
    ],
)
def test_bad_input(backend, call, kind, match):
    with pytest.raises(kind, match=match):
        call()


@pytest.mark.parametrize("backend", ["cpu", "cuda_on_host"], indirect=True)
@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"x": torch.zeros(4).half()}, "float32 or float64"),
        ({"drift": torch.zeros(5)}, "drifts must be like x"),
        ({"other": torch.zeros(4).double()}, "drifts must be like x"),
        ({"drift": None, "other": torch.zeros(4)}, "second drift needs a first"),
        ({"seed": torch.zeros(2, dtype=torch.int64)}, "seed must be one int64"),
        ({"seed": torch.zeros(())}, "seed must be one int64"),
    ],
)
def test_the_op_refuses_what_it_would_read_wrong(backend, change, words):
    given = {"x": torch.zeros(4), "drift": torch.zeros(4), "other": None}
    given |= {"seed": torch.tensor(1), "index": 0, "step": 0.1, "scale": 1.0} | change
    with pytest.raises(RuntimeError, match=words):
        torch.ops.pyflowkern.diffusion_step(**given)
