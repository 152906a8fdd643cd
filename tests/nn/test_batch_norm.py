"""BatchNorm: statistics of the batch in training, running statistics afterwards."""

import copy
import pickle

import pytest
import torch
from laws import normal

from pyflowkern import nn


def batch(n=16, *shape, seed=0, dtype=torch.float64):
    return 3 * normal(n, *(shape or (3,)), seed=seed, dtype=dtype) + 7


def torch_layer(layer):
    """Return torch's layer of the same state."""
    other = torch.nn.BatchNorm1d(layer.channels, eps=layer.eps, momentum=layer.momentum).double()
    with torch.no_grad():
        other.weight.copy_(layer.log_scale.exp())
        other.bias.copy_(layer.bias)
    return other


@pytest.mark.parametrize("momentum", [0.1, 1.0, None])
@pytest.mark.parametrize("shape", [(3,), (3, 4)])
def test_values_gradients_and_statistics_are_those_of_torch(backend, momentum, shape):
    layer = nn.BatchNorm(3, momentum=momentum, eps=1e-3).double().to(backend)
    with torch.no_grad():
        layer.log_scale.copy_(torch.tensor([0.3, -0.5, 0.1]))
        layer.bias.copy_(torch.tensor([1.0, 0.0, -2.0]))
    other = torch_layer(layer).to(backend)
    for step in range(3):
        x = batch(16, *shape, seed=step).to(backend).requires_grad_()
        z, _ = layer(x)
        expected = other(x)
        torch.testing.assert_close(z, expected, rtol=1e-11, atol=1e-11)
        weights = normal(*x.shape, seed=9).to(backend)
        found = torch.autograd.grad((z * weights).sum(), (x, layer.bias, layer.log_scale))
        wanted = torch.autograd.grad((expected * weights).sum(), (x, other.bias, other.weight))
        torch.testing.assert_close(found[:2], wanted[:2], rtol=1e-10, atol=1e-11)
        torch.testing.assert_close(found[2], wanted[2] * other.weight, rtol=1e-10, atol=1e-11)
    for name in ("running_mean", "running_var"):
        torch.testing.assert_close(getattr(layer, name), getattr(other, name))
    assert layer.batches == 3
    layer.eval()
    other.eval()
    torch.testing.assert_close(layer(x)[0], other(x), rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("shape", [(3,), (3, 2, 2)])
def test_log_det_has_the_gradients_of_the_batch_statistics(backend, shape):
    layer = nn.BatchNorm(3).double().to(backend)

    x = batch(5, *shape).to(backend).requires_grad_()
    space = x[0, 0].numel()
    axes = [0, *range(2, x.dim())]
    expected = space * (layer.log_scale - 0.5 * torch.log(x.var(axes, correction=0) + layer.eps))
    found = layer(x)[1]
    assert found.shape == (5,)
    torch.testing.assert_close(found, expected.sum().expand(5), rtol=1e-11, atol=1e-11)
    wanted = torch.autograd.grad(expected.sum(), (x, layer.log_scale))
    torch.testing.assert_close(torch.autograd.grad(found.sum() / 5, (x, layer.log_scale)), wanted)
    assert torch.autograd.gradcheck(lambda x: layer(x), (x,))
    assert torch.autograd.gradgradcheck(lambda x: layer(x), (x,))


def test_the_inverse_undoes_evaluation_in_either_mode():
    layer = nn.BatchNorm(3).double()
    for step in range(5):
        layer(batch(seed=step))
    before = copy.deepcopy(layer.state_dict())
    x = batch()
    z, log_det = copy.deepcopy(layer).eval()(x)
    for training in (True, False):
        back, minus = layer.train(training).inverse(z)
        torch.testing.assert_close(back, x)
        torch.testing.assert_close(minus, -log_det)
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_running_statistics_are_never_spoilt(poison):
    layer = nn.BatchNorm(3)
    layer(batch(dtype=torch.float32))
    before = copy.deepcopy(layer.state_dict())
    x = batch(dtype=torch.float32, seed=1)
    x[3, 1] = poison
    z, _ = layer(x)
    assert not z[:, 1].isfinite().all()
    assert z[:, [0, 2]].isfinite().all()
    for name in ("running_mean", "running_var"):
        after = getattr(layer, name)
        assert after[1] == before[name][1]
        assert (after != before[name]).tolist() == [True, False, True]


def test_an_empty_batch_changes_nothing_and_one_value_has_no_variance():
    layer = nn.BatchNorm(3)
    before = copy.deepcopy(layer.state_dict())
    z, log_det = layer(torch.zeros(0, 3))
    assert (z.shape, log_det.shape) == ((0, 3), (0,))
    torch.testing.assert_close(layer.state_dict(), before, rtol=0, atol=0)
    with pytest.raises(ValueError, match=r"x must have two values a channel .*got shape \(1, 3\)"):
        layer(torch.zeros(1, 3))
    assert layer(torch.ones(1, 3, 2))[0].shape == (1, 3, 2)
    assert layer.eval()(torch.zeros(1, 3))[0].shape == (1, 3)


def test_constant_channels_stay_finite():
    layer = nn.BatchNorm(2)
    z, log_det = layer(torch.tensor([[5.0, 1.0], [5.0, 2.0]]))
    assert z.isfinite().all()
    assert log_det.isfinite().all()
    assert not z[:, 0].any()


def test_statistics_become_float32_where_float64_becomes_half():
    layer = nn.BatchNorm(3).double()
    assert layer.running_mean.dtype == torch.float64
    assert layer.bfloat16().running_mean.dtype == torch.float32
    assert layer(batch(8, dtype=torch.bfloat16))[0].dtype == torch.bfloat16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_statistics_stay_float32_in_half_precision(dtype):
    layer = nn.BatchNorm(3).to(dtype)
    wide = nn.BatchNorm(3)
    assert layer.log_scale.dtype == dtype
    for step in range(50):
        x = batch(64, seed=step, dtype=torch.float32).to(dtype)
        z, log_det = layer(x)
        wide(x.float())
        assert (z.dtype, log_det.dtype) == (dtype, torch.float32)
    for name in ("running_mean", "running_var"):
        assert getattr(layer, name).dtype == torch.float32
        torch.testing.assert_close(getattr(layer, name), getattr(wide, name))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, log_det = wide(x.float())
    assert (z.dtype, log_det.dtype) == (torch.float32, torch.float32)
    assert layer.double().running_mean.dtype == torch.float64


def test_copies_files_and_resets():
    layer = nn.BatchNorm(3, momentum=None)
    layer(batch(dtype=torch.float32))
    x = batch(dtype=torch.float32, seed=1)
    fresh = nn.BatchNorm(3, momentum=None)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        for mode in (False, True):
            expected = copy.deepcopy(layer).train(mode)(x)
            torch.testing.assert_close(other.train(mode)(x), expected, rtol=0, atol=0)
    layer.reset_parameters()
    torch.testing.assert_close(layer.state_dict(), nn.BatchNorm(3).state_dict())


def test_it_trains_in_one_compiled_graph():
    layer = nn.BatchNorm(3).double()
    other, x = copy.deepcopy(layer), batch()
    compiled = torch.compile(other, backend="aot_eager", fullgraph=True)
    for _ in range(2):
        torch.testing.assert_close(compiled(x), layer(x))
    torch.testing.assert_close(other.state_dict(), layer.state_dict())


def test_statistics_of_a_whole_data_set():
    """With ``momentum=None``, as Papamakarios et al. (2017) take them from the training data."""
    data, layer = batch(400), nn.BatchNorm(3, momentum=None).double()
    for part in data.split(100):
        layer(part)
    torch.testing.assert_close(layer.running_mean, data.mean(0))
    torch.testing.assert_close(
        layer.running_var, torch.stack([p.var(0) for p in data.split(100)]).mean(0)
    )


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"channels": 0}, ValueError, "channels must be at least 1, got 0"),
        ({"eps": 0.0}, ValueError, "eps must be positive and finite, got 0.0"),
        ({"eps": "1"}, TypeError, "eps must be a number, got str"),
        ({"momentum": 1.5}, ValueError, r"momentum must be in \(0, 1\] or None, got 1.5"),
        ({"momentum": 0}, ValueError, "momentum must be in"),
        ({"affine": 1}, TypeError, "affine must be True or False, got 1"),
        ({"synchronize": None}, TypeError, "synchronize must be True or False, got None"),
    ],
)
def test_wrong_options(options, error, message):
    with pytest.raises(error, match=message):
        nn.BatchNorm(**({"channels": 3} | options))
