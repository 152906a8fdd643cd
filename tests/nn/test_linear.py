"""Invertible matrices: initial values, determinants, and the cache of matrices and inverses."""

import copy
import pickle
from functools import partial

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows, nn, ops

KINDS = ["plu", "dense", "householder"]
kinds = pytest.mark.parametrize("kind", KINDS)


@kinds
@pytest.mark.parametrize("channels", [1, 2, 5, 12])
def test_the_initial_matrix_is_a_rotation(kind, channels):
    weight, log_abs_det = nn.InvertibleLinear(channels, parameterization=kind).matrix()
    torch.testing.assert_close(weight @ weight.mT, torch.eye(channels), atol=1e-5, rtol=0)
    torch.testing.assert_close(log_abs_det, torch.zeros(()), atol=1e-5, rtol=0)


@kinds
def test_inverse_and_determinant(kind):
    layer = randomize(nn.InvertibleLinear(6, parameterization=kind).double())
    weight, log_abs_det = layer.matrix()
    inverse, same = layer.matrix(inverse=True)
    torch.testing.assert_close(weight @ inverse, torch.eye(6).double())
    torch.testing.assert_close(log_abs_det, torch.linalg.slogdet(weight).logabsdet)
    assert torch.equal(log_abs_det, same)


@kinds
def test_the_log_det_counts_every_pixel(kind):
    layer = randomize(nn.InvertibleConv1x1(4, parameterization=kind))
    _, log_det = layer(normal(2, 4, 3, 5, dtype=torch.float32))
    torch.testing.assert_close(log_det, (15 * layer.matrix()[1]).expand(2))


@kinds
def test_matrices_are_kept_in_eval_mode_without_gradients_only(kind):
    layer = nn.InvertibleLinear(4, parameterization=kind)
    matrix = layer.kept_matrix
    for inverse in (False, True):
        with torch.no_grad():
            layer.train()
            assert matrix(inverse=inverse) is not matrix(inverse=inverse)
            layer.eval()
            assert matrix(inverse=inverse) is matrix(inverse=inverse)
            assert layer.matrix(inverse=inverse) is not layer.matrix(inverse=inverse)
        assert matrix(inverse=inverse)[0].requires_grad  # with gradients, nothing is cached


CHANGES = {
    "optimiser step": lambda layer: torch.optim.SGD(layer.parameters(), lr=1.0).step(),
    "in place": lambda layer: [p.add_(0.5) for p in layer.parameters()],
    "in place through data": lambda layer: [p.data.add_(0.5) for p in layer.parameters()],
    "fused optimiser": lambda layer: torch.optim.Adam(
        layer.parameters(), lr=0.1, fused=True
    ).step(),
    "new data": lambda layer: [setattr(p, "data", p.data + 0.5) for p in layer.parameters()],
    "load_state_dict": lambda layer: layer.load_state_dict(
        randomize(copy.deepcopy(layer)).state_dict()
    ),
    "another dtype": lambda layer: layer.double(),
}


@kinds
@pytest.mark.parametrize("change", CHANGES)
def test_kept_matrices_follow_the_parameters(kind, change):
    layer = nn.InvertibleLinear(4, parameterization=kind).eval()
    for p in layer.parameters():
        p.grad = torch.ones_like(p)
    with torch.no_grad():
        layer.kept_matrix(), layer.kept_matrix(inverse=True)
        CHANGES[change](layer)
        for inverse in (False, True):
            kept = layer.kept_matrix(inverse=inverse)
            for a, b in zip(kept, layer._compute(inverse), strict=True):
                assert torch.equal(a, b)


@kinds
def test_kept_matrices_are_of_the_parameters_of_a_functional_call(kind):
    layer = nn.InvertibleLinear(4, parameterization=kind).eval()
    other = randomize(copy.deepcopy(layer))
    x = normal(3, 4, dtype=torch.float32)
    with torch.no_grad():
        layer(x)
        z, _ = torch.func.functional_call(layer, other.state_dict(), (x,))
        assert torch.equal(z, other(x)[0])


@kinds
def test_kept_matrices_are_neither_copied_nor_pickled(kind):
    layer = nn.InvertibleLinear(4, parameterization=kind).eval()
    with torch.inference_mode():
        layer.kept_matrix()
    assert layer._kept[False]._kept
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        assert not other._kept[False]._kept


@kinds
def test_matrices_kept_in_inference_mode_serve_outside(kind):
    layer = nn.InvertibleLinear(4, parameterization=kind).eval()
    x = torch.randn(3, 4, requires_grad=True)
    with torch.inference_mode():
        expected = layer(x)[0].clone()
    with torch.no_grad():
        torch.testing.assert_close(layer(x)[0], expected)
    layer(x)[0].sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.InvertibleLinear(4),
        lambda: nn.InvertibleLinear(4, parameterization="dense"),
        lambda: nn.Permutation(4),
        lambda: nn.MaskedAutoregressive(4, hidden=(8,)),
    ],
)
def test_what_frozen_layers_keep_in_inference_mode_lets_gradients_through_outside(make):
    layer = make().eval().requires_grad_(False)
    for function in (layer, layer.inverse):
        x = torch.randn(3, 4, requires_grad=True)
        with torch.inference_mode():
            expected = function(x)[0].clone()
        y, _ = function(x)
        y.sum().backward()  # tensors made in inference mode cannot be saved for it
        torch.testing.assert_close(y, expected)
        assert x.grad.isfinite().all()


@kinds
def test_models_made_in_inference_mode_work(kind):
    with torch.inference_mode():
        layer = nn.InvertibleLinear(4, parameterization=kind).eval()
        x = torch.randn(3, 4)
        torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


def test_a_singular_dense_matrix_has_no_inverse_and_says_so():
    layer = nn.InvertibleLinear(3, parameterization="dense")
    with torch.no_grad():
        layer.weight.copy_(torch.tensor([[1.0, 2, 3], [0, 1, 0], [1, 2, 3]]))
    x = torch.randn(2, 3)
    assert (layer(x)[1] == -torch.inf).all()
    with pytest.raises(RuntimeError, match=r"weight \[3, 3\] is singular; parameterization='plu'"):
        layer.inverse(x)
    with pytest.raises(RuntimeError, match="singular"), torch.no_grad():
        layer.eval().inverse(x)


def test_vmap_over_models():
    """Matrices of parameters under vmap must not be cached."""
    models = [nn.InvertibleLinear(3, parameterization="dense").eval() for _ in range(2)]
    weights = torch.stack([m.weight.detach() for m in models])
    x = torch.randn(5, 3)

    def run(weight):
        return torch.func.functional_call(models[0], {"weight": weight}, (x,))[0]

    with torch.no_grad():
        z = torch.func.vmap(run)(weights)
        for i, m in enumerate(models):
            torch.testing.assert_close(z[i], m(x)[0])


def test_glow_step_is_actnorm_then_linear():
    step = randomize(nn.GlowStep(4)).eval()
    x = normal(2, 4, 3, 3, dtype=torch.float32)
    z, log_det = step(x)
    y, first = step.actnorm(x)
    expected, second = step.linear(y)
    torch.testing.assert_close(z, expected)
    torch.testing.assert_close(log_det, first + second)


def test_bad_arguments_are_named():
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        nn.InvertibleLinear(0)
    with pytest.raises(ValueError, match=r"parameterization must be 'plu', .* got 'svd'"):
        nn.InvertibleLinear(3, parameterization="svd")


def test_the_matrix_is_that_of_the_op():
    layer = nn.InvertibleLinear(3)
    args = (layer.permutation.long(), layer.lower, layer.upper, layer.log_diag, layer.sign)
    assert torch.equal(layer.matrix()[0], ops.plu_matrix(*args))


@pytest.mark.parametrize("parameterization", ["plu", "dense"])
def test_initial_values(parameterization):
    first = partial(nn.InvertibleLinear, 6, parameterization=parameterization)
    assert torch.equal(first(init="identity").matrix()[0], torch.eye(6))
    permutation = first(init="permutation").matrix()[0]
    assert torch.equal(permutation.sort(1).values, torch.eye(6)[:, -1:].T.repeat(6, 1))
    assert torch.equal(permutation @ permutation.T, torch.eye(6))
    with pytest.raises(ValueError, match=r"init must be one of rotation, .* got 'zero'"):
        first(init="zero")
    with pytest.raises(ValueError, match="init must be 'rotation' for 'householder'"):
        nn.InvertibleLinear(6, parameterization="householder", init="identity")


def test_weights_that_are_averaged_through_data_are_seen():
    """Neither writes to ``.data`` nor fused optimizers change a tensor's version counter."""
    layer, x = nn.InvertibleLinear(2, init="identity").eval(), torch.ones(1, 2)
    with torch.no_grad():
        layer(x), layer.inverse(x)
        layer.log_diag.data.add_(1.0)
        z, log_det = layer(x)
    torch.testing.assert_close(z, torch.full((1, 2), torch.e))
    assert log_det.tolist() == [2.0]

    flow = flows.NSF(3, transforms=2, hidden=(8, 8)).eval()
    average = copy.deepcopy(flow)
    randomize(flow)
    x = normal(64, 3, dtype=torch.float32)
    with torch.no_grad():
        average.log_prob(x)
        for p, q in zip(average.parameters(), flow.parameters(), strict=True):
            p.data.lerp_(q, 1.0)
        torch.testing.assert_close(average.log_prob(x), copy.deepcopy(average).log_prob(x))


def test_the_caller_may_change_a_returned_matrix():
    layer = nn.InvertibleLinear(3).eval()
    x = torch.randn(2, 3)
    with torch.no_grad():
        expected = layer(x)[0]
        layer.matrix()[0].zero_()
        assert torch.equal(layer(x)[0], expected)


def test_clear_cache_of_a_transform():
    layer = nn.InvertibleLinear(2, init="identity")
    transform = layer.transform(cache_size=1)
    x = torch.ones(1, 2)
    transform(x)
    layer.log_diag.data.add_(1.0)
    transform.clear_cache()
    torch.testing.assert_close(transform(x), torch.full((1, 2), torch.e))
    assert transform.log_abs_det_jacobian(x, transform(x)).tolist() == [2.0]
