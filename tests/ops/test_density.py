"""normal_log_prob and bits_per_dim: values, gradients, layouts, determinism, bad input."""

import itertools
import math

import pytest
import torch
from laws import normal

import pyflowkern
from pyflowkern.ops import bits_per_dim, density, normal_log_prob, normal_log_prob_reference

FLOATS = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
KINDS = [None, "event", "element"]
SHAPES = [(4, 1), (4, 3), (3, 127), (3, 129), (2, 1000), (5, 3, 9, 7), (2, 4100), (6,)]


def make(shape, mean, log_std, dtype=torch.float64, seed=0):
    """z, mean, log_std and log_det of the wanted kinds."""

    def parameter(kind, seed):
        if kind is None:
            return None
        return 0.5 * normal(*(shape if kind == "element" else shape[1:]), seed=seed)

    tensors = [
        normal(*shape, seed=seed),
        parameter(mean, seed + 1),
        parameter(log_std, seed + 2),
        normal(*shape[:1], seed=seed + 3),
    ]
    return [None if t is None else t.to(dtype) for t in tensors]


def double(tensors):
    return [None if t is None else t.double() for t in tensors]


# --- values --------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matches_float64(backend, shape, dtype):
    for mean, log_std in itertools.product(KINDS, KINDS):
        *args, log_det = make(shape, mean, log_std, dtype)
        value = normal_log_prob(*args, log_det=log_det)
        plain = normal_log_prob_reference(*args, log_det=log_det)
        exact = normal_log_prob_reference(*double(args), log_det=log_det.double())
        assert value.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        eps = torch.finfo(value.dtype).eps
        gap, plain_gap = ((t.double() - exact).abs().max() for t in (value, plain))
        # the floor: two roundings of every term, were they all of the same sign; float64 is its own
        # reference
        assert gap <= 2 * plain_gap + 2 * eps * (math.prod(shape[1:]) + exact.abs().max())


def test_matches_torch_distributions(backend):
    z, mean, log_std, _ = make((5, 3, 4), "event", "element", torch.float32)
    expected = torch.distributions.Normal(mean, log_std.exp()).log_prob(z).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(z, mean, log_std), expected)
    standard = torch.distributions.Normal(0.0, 1.0).log_prob(z).sum((1, 2))
    torch.testing.assert_close(normal_log_prob(z), standard)


def test_long_sums_keep_their_digits(backend):
    """A million terms: float32 partial sums over short runs, then float64."""
    z = normal(2, 1_000_000, dtype=torch.float32)
    exact = normal_log_prob_reference(z.double())
    assert ((normal_log_prob(z).double() - exact) / exact).abs().max() < 3e-7


def test_broadcast_parameters(backend):
    z = normal(4, 3, 5, 2, dtype=torch.float32)
    for shape in ((), (1,), (3, 1, 1), (5, 2), (1, 3, 1, 1), (4, 1, 1, 1), (4, 3, 1, 1)):
        p = normal(*shape, dtype=torch.float32, seed=1)
        torch.testing.assert_close(
            normal_log_prob(z, p, p), normal_log_prob_reference(z, p, p), rtol=1e-5, atol=1e-5
        )


def test_mixed_dtypes(backend):
    z = normal(4, 130, dtype=torch.bfloat16)
    mean, log_std = normal(130, dtype=torch.float32, seed=1), normal(4, 130, seed=2)
    value = normal_log_prob(z, mean, log_std.bfloat16())
    assert value.dtype == torch.float32
    expected = normal_log_prob_reference(z.double(), mean.double(), log_std.bfloat16().double())
    torch.testing.assert_close(value.double(), expected, rtol=1e-5, atol=1e-4)
    assert normal_log_prob(z, mean, log_std).dtype == torch.float64
    assert normal_log_prob(z, mean.double()).dtype == torch.float64


def layouts(t):
    yield t.to(memory_format=torch.channels_last)
    yield torch.stack((t, t), -1)[..., 0]
    yield t.transpose(2, 3).contiguous().transpose(2, 3)


@pytest.mark.parametrize("kind", KINDS)
def test_layouts(backend, kind):
    z, mean, log_std, log_det = make((5, 3, 9, 7), kind, kind, torch.float32)
    for other in (z, *layouts(z)):
        leaves = [None if t is None else t.clone().requires_grad_() for t in (mean, log_std)]
        v = other.detach().requires_grad_()
        value = normal_log_prob(v, *leaves, log_det=log_det)
        expected = normal_log_prob_reference(z, mean, log_std, log_det=log_det)
        torch.testing.assert_close(value, expected)
        value.sum().backward()
        plain = [None if t is None else t.clone().requires_grad_() for t in (z, mean, log_std)]
        normal_log_prob_reference(*plain).sum().backward()
        for a, b in zip((v, *leaves), plain, strict=True):
            if a is not None:
                torch.testing.assert_close(a.grad, b.grad, rtol=1e-5, atol=1e-5)


def test_layouts_of_parameters_may_differ_from_that_of_z(backend):
    z, mean, log_std, _ = make((5, 3, 9, 7), "element", "element", torch.float32)
    expected = normal_log_prob(z, mean, log_std)
    for other in layouts(mean):
        torch.testing.assert_close(normal_log_prob(z, other, log_std), expected)
        cl = z.to(memory_format=torch.channels_last)
        torch.testing.assert_close(normal_log_prob(cl, other, log_std), expected)


def test_empty(backend):
    for shape in ((0, 3), (0, 3, 4, 4), (0,), (3, 0)):
        z = torch.zeros(shape, requires_grad=True)
        mean = torch.zeros(shape[1:], requires_grad=True)
        value = normal_log_prob(z, mean, mean)
        assert value.shape == shape[:1]
        assert torch.equal(value, torch.zeros(shape[:1]))
        value.sum().backward()
        assert z.grad.shape == shape
        assert torch.equal(mean.grad, torch.zeros(shape[1:]))


# --- gradients -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("shape", [(4, 1), (70, 3), (3, 129), (31, 1030), (5, 3, 9, 7)], ids=str)
def test_gradients(backend, shape, dtype):
    for mean, log_std in itertools.product(KINDS, KINDS):
        tensors = make(shape, mean, log_std, dtype)
        g = normal(*shape[:1], seed=9).to(torch.promote_types(dtype, torch.float32))
        grads = []
        for f, args in ((normal_log_prob, tensors), (normal_log_prob_reference, double(tensors))):
            leaves = [None if t is None else t.clone().requires_grad_() for t in args]
            value = f(*leaves[:3], log_det=leaves[3])
            value.backward(g.to(value.dtype))
            grads.append([None if t is None else t.grad for t in leaves])
        eps = torch.finfo(dtype).eps
        for ours, exact in zip(*grads, strict=True):
            if ours is None:
                continue
            assert ours.dtype == dtype
            # a sum over the batch rounds every term once: against the largest of them
            scale = exact.abs().max() + 1
            assert (ours.double() - exact).abs().max() <= 8 * eps * scale * math.sqrt(shape[0])


@pytest.mark.parametrize("mean", KINDS)
@pytest.mark.parametrize("log_std", KINDS)
def test_gradcheck(backend, mean, log_std):
    tensors = make((3, 2, 2), mean, log_std)
    leaves = [None if t is None else t.requires_grad_() for t in tensors]

    def f(z, m, s, log_det):
        return normal_log_prob(z, m, s, log_det=log_det)

    assert torch.autograd.gradcheck(f, leaves)
    assert torch.autograd.gradgradcheck(f, leaves)


def test_only_the_wanted_gradients(backend):
    z, mean, log_std, _ = make((4, 9), "event", "element", torch.float32)
    for wanted in range(3):
        leaves = [t.clone().requires_grad_(i == wanted) for i, t in enumerate((z, mean, log_std))]
        normal_log_prob(*leaves).sum().backward()
        every = [t.clone().requires_grad_() for t in (z, mean, log_std)]
        normal_log_prob_reference(*every).sum().backward()
        torch.testing.assert_close(leaves[wanted].grad, every[wanted].grad, rtol=1e-5, atol=1e-5)


def test_threads_do_not_matter(backend):
    args = make((67, 3, 33, 31), "event", "event", torch.float32)
    results = []
    for threads in (1, 2):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        leaves = [t.clone().requires_grad_() for t in args]
        value = normal_log_prob(*leaves[:3], log_det=leaves[3])
        value.sum().backward()
        results.append([value.detach(), *(t.grad for t in leaves)])
        torch.set_num_threads(before)
    for a, b in zip(*results, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("size", [3, 129, 700, 2000, 40_000])
def test_values_do_not_depend_on_the_place_in_the_batch(backend, size):
    z, p = normal(40, size, dtype=torch.float32), normal(size, dtype=torch.float32, seed=1)
    assert torch.equal(normal_log_prob(z, p, p)[31:], normal_log_prob(z[31:], p, p))


def test_bad_rows_stay_where_they_are(backend):
    z = normal(5, 33, dtype=torch.float32)
    good = normal_log_prob(z)
    z[2, 7], z[3, 1] = math.nan, math.inf
    value = normal_log_prob(z)
    rows = torch.tensor([0, 1, 4])
    assert torch.equal(value[rows], good[rows])
    assert value[2].isnan()
    assert value[3] == -math.inf


# --- bits per dimension --------------------------------------------------------------------------


def test_bits_per_dim(backend):
    log_prob = torch.tensor([-3072 * math.log(2), 0.0], requires_grad=True)
    value = bits_per_dim(log_prob, 3072)
    torch.testing.assert_close(value, torch.tensor([1.0, 0.0]))
    value.sum().backward()
    torch.testing.assert_close(log_prob.grad, torch.full((2,), -1 / (3072 * math.log(2))))


# --- torch's own checks, bad input ---------------------------------------------------------------


def test_opcheck(backend):
    if not density.kernel_serves("normal_log_prob", torch.ones(1)):
        pytest.skip("the reference has no op")
    ops = torch.ops.pyflowkern
    for mean, log_std in ((None, None), ("event", "element"), ("element", "event")):
        tensors = make((3, 4, 5, 6), mean, log_std, torch.float32)
        leaves = [None if t is None else t.requires_grad_() for t in tensors]
        torch.library.opcheck(ops.normal_log_prob.default, tuple(leaves))
        for z in (tensors[0], tensors[0].to(memory_format=torch.channels_last)):
            args = [None if t is None else t.detach() for t in (tensors[3], z, *tensors[1:3])]
            torch.library.opcheck(ops.normal_log_prob_backward.default, (*args, 7))


@pytest.mark.slow
def test_compiles_into_one_graph(backend):
    tensors = make((4, 6), "event", "element", torch.float32)
    results = []
    for f in (torch.compile(normal_log_prob, fullgraph=True), normal_log_prob):
        leaves = [t.clone().requires_grad_() for t in tensors]
        value = f(*leaves[:3], log_det=leaves[3])
        value.sum().backward()
        results.append([value.detach(), *(t.grad for t in leaves)])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_functional_transforms_take_the_reference(backend):
    z = normal(3, 4)
    grad = torch.func.vmap(torch.func.grad(lambda v: normal_log_prob(v[None])[0]))(z)
    torch.testing.assert_close(grad, -z)


def zeros():
    return torch.zeros(4, 3)


@pytest.mark.parametrize(
    ("call", "error", "match"),
    [
        (lambda: normal_log_prob(torch.zeros(4, 3, dtype=torch.int64)), TypeError, "floating"),
        (lambda: normal_log_prob(torch.tensor(1.0)), ValueError, "batch"),
        (
            lambda: normal_log_prob(zeros(), torch.zeros(4)),
            ValueError,
            "mean must be broadcastable",
        ),
        (
            lambda: normal_log_prob(zeros(), torch.zeros(5, 3)),
            ValueError,
            "mean must be broadcastable",
        ),
        (
            lambda: normal_log_prob(zeros(), torch.zeros(1, 4, 3)),
            ValueError,
            "mean must be broadcast",
        ),
        (lambda: normal_log_prob(zeros(), None, torch.zeros(2)), ValueError, "log_std must be"),
        (lambda: normal_log_prob(zeros(), 1.0), TypeError, "mean must be a torch.Tensor"),
        (
            lambda: normal_log_prob(zeros(), log_det=torch.zeros(3)),
            ValueError,
            "log_det must have",
        ),
        (lambda: bits_per_dim(torch.zeros(3), 0), ValueError, "dims"),
        (lambda: bits_per_dim(torch.zeros(3), 2.0), TypeError, "dims"),
        (lambda: bits_per_dim(3.0, 2), TypeError, "log_prob"),
    ],
)
def test_bad_input(backend, call, error, match):
    with pytest.raises(error, match=match):
        call()


def test_public_names():
    assert set(density.__all__) <= set(pyflowkern.ops.__all__)
