"""ActNorm: the first training batch, and no other, sets scale and bias."""

import copy
import io

import pytest
import torch
from laws import normal
from torch.utils._python_dispatch import TorchDispatchMode

from pyflowkern import nn, ops


def moments(z):
    axes = [d for d in range(z.dim()) if d != 1]
    return z.double().mean(axes), z.double().var(axes, correction=0)


@pytest.mark.parametrize("shape", [(64, 3), (16, 3, 5), (8, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("make", [nn.ActNorm, nn.GlowStep])
def test_first_batch_leaves_with_mean_0_and_variance_1(shape, mean, make):
    x = (normal(*shape) * 3 + mean).float()
    layer = make(3)
    z, _ = layer(x)
    if make is nn.GlowStep:  # undo the rotation that follows
        weight, _ = layer.linear.matrix(inverse=True)
        z = torch.einsum("ij,nj...->ni...", weight, z)
    got_mean, got_var = moments(z.detach())
    # at 1e4 float32 has a spacing of 1e-3: the mean of the data is known to a fraction of that
    tolerance = 1e-5 + mean * 2**-23
    torch.testing.assert_close(got_mean, torch.zeros(3).double(), atol=tolerance, rtol=0)
    torch.testing.assert_close(got_var, torch.ones(3).double(), atol=1e-3, rtol=0)


def test_only_the_first_batch_counts():
    layer = nn.ActNorm(3)
    layer(normal(32, 3).float() + 5)
    before = copy.deepcopy(layer.state_dict())
    layer(normal(32, 3, seed=1).float() * 9)
    assert all(torch.equal(before[k], v) for k, v in layer.state_dict().items())


def test_eval_mode_is_the_identity_and_does_not_initialise():
    layer = nn.ActNorm(3).eval()
    x = normal(8, 3).float() + 5
    z, log_det = layer(x)
    assert torch.equal(z, x)
    assert torch.equal(log_det, torch.zeros(8))
    assert not layer.initialized
    layer.train()(x)
    assert layer.initialized


def test_sampling_does_not_initialise():
    layer = nn.ActNorm(3)
    with torch.no_grad():
        layer.inverse(normal(8, 3).float() + 5)
    assert not layer.initialized


def test_resuming_does_not_initialise_again():
    trained = nn.ActNorm(3)
    trained(normal(32, 3).float() + 5)
    file = io.BytesIO()
    torch.save(trained.state_dict(), file)
    file.seek(0)
    resumed = nn.ActNorm(3)
    resumed.load_state_dict(torch.load(file))
    resumed(normal(32, 3, seed=1).float() * 9)
    assert torch.equal(resumed.log_scale, trained.log_scale)
    assert torch.equal(resumed.bias, trained.bias)


def test_loading_an_untrained_state_initialises_again():
    layer = nn.ActNorm(3)
    untrained = copy.deepcopy(layer.state_dict())
    layer(normal(32, 3).float() + 5)
    layer.load_state_dict(untrained)
    layer(normal(32, 3).float() - 7)
    torch.testing.assert_close(layer.bias, torch.full((3,), 7.0), atol=1.0, rtol=0)


def test_a_constant_channel_keeps_its_scale():
    x = normal(16, 3).float()
    x[:, 0] = 1e4
    x[3, 1] = 3e38  # its square overflows
    layer = nn.ActNorm(3)
    layer(x)
    assert layer.log_scale[0] == layer.log_scale[1] == 0
    assert layer.bias[0] == -1e4
    assert layer.log_scale[2] != 0


SPOILT = {"first": [0], "some": [1, 4, 5], "all but two": list(range(2, 12))}


@pytest.mark.parametrize("rows", SPOILT.values(), ids=SPOILT)
@pytest.mark.parametrize("shape", [(12, 3), (12, 3, 4, 4)], ids=str)
@pytest.mark.parametrize("mean", [0.0, 1e4])
@pytest.mark.parametrize("make", [nn.ActNorm, nn.GlowStep])
def test_samples_that_are_not_finite_are_left_out(rows, shape, mean, make):
    """The others are used as if they were the whole batch, with the same accuracy."""
    x = (normal(*shape) * 3 + mean).float()
    kept = [i for i in range(len(x)) if i not in rows]
    x[rows, 1] = (
        torch.tensor([torch.nan, torch.inf, -torch.inf])
        .repeat(4)[: len(rows)]
        .view(-1, *[1] * (x.dim() - 2))
    )
    layer, alone = make(3), make(3)
    layer(x)
    alone(x[kept])
    layer, alone = (m.actnorm if make is nn.GlowStep else m for m in (layer, alone))
    assert layer.initialized
    # two roundings of the mean, and their effect on the variance
    torch.testing.assert_close(layer.bias, alone.bias, atol=1e-6, rtol=2**-22)
    torch.testing.assert_close(layer.log_scale, alone.log_scale, atol=1e-5, rtol=1e-5)


def test_in_half_precision_too_samples_are_left_out():
    x = (normal(12, 3) * 2 + 100).bfloat16()
    x[3], x[7, 0] = torch.nan, torch.inf
    layer, alone = nn.ActNorm(3), nn.ActNorm(3)
    layer(x)
    alone(x[x.isfinite().all(1)])
    torch.testing.assert_close(layer.state_dict(), alone.state_dict(), atol=1e-5, rtol=1e-5)


def test_a_batch_without_a_finite_sample_is_not_the_first():
    layer, fresh = nn.ActNorm(3), nn.ActNorm(3)
    for _ in range(2):
        bad = normal(8, 3).float()
        bad[:, 1] = torch.nan
        z, _ = layer(bad)
        assert torch.equal(z[:, ::2], bad[:, ::2])  # the identity
        assert all(torch.equal(layer.state_dict()[k], v) for k, v in fresh.state_dict().items())
    x = normal(8, 3, seed=1).float() * 4 - 9
    layer(x)
    fresh(x)
    assert layer.initialized
    assert all(torch.equal(layer.state_dict()[k], v) for k, v in fresh.state_dict().items())


def test_moments_are_not_computed_for_ever(monkeypatch):
    looks = []
    moments = ops.channel_moments
    monkeypatch.setattr(ops, "channel_moments", lambda x: looks.append(1) or moments(x))
    layer = nn.ActNorm(3)
    for _ in range(10):
        layer(normal(8, 3).float())
    assert 0 < len(looks) < 8


@pytest.mark.slow
@pytest.mark.parametrize("bad", [0, 3, 8])
def test_compiled_initialisation_leaves_out_what_is_not_finite(bad):
    layer, eager = nn.ActNorm(3), nn.ActNorm(3)
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    x = normal(8, 3).float() * 3 + 1
    x[:bad, 1] = torch.nan
    for seed in range(2):
        found, expected = compiled(x), eager(x)
        torch.testing.assert_close(found, expected, equal_nan=True)
        assert layer.initialized == eager.initialized == (bad < 8)
        x = normal(8, 3, seed=seed).float() if bad < 8 else x


def test_an_empty_batch_is_not_the_first():
    layer = nn.ActNorm(3)
    layer(torch.zeros(0, 3))
    assert not layer.initialized
    layer(normal(16, 3).float())
    assert torch.isfinite(layer.log_scale).all()


def test_initialisation_under_autocast_and_in_half_precision():
    x = normal(64, 3).float() * 2 + 3
    expected = nn.ActNorm(3)
    expected(x)
    layer = nn.ActNorm(3)
    with torch.autocast("cpu", torch.bfloat16):
        layer(x)
    assert torch.equal(layer.log_scale, expected.log_scale)
    half = nn.ActNorm(3).bfloat16()
    half(x.bfloat16())
    torch.testing.assert_close(
        half.log_scale.float(), expected.log_scale.detach(), atol=0.01, rtol=0.01
    )


def test_the_layer_waits_for_the_device_at_initialisation_only():
    class Looks(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            looks.append("_local_scalar_dense" in str(func))
            return func(*args, **(kwargs or {}))

    layer, looks = nn.ActNorm(3), []
    with Looks():
        layer(normal(8, 3).float())
        assert sum(looks) == 2  # whether it is initialised, and whether this batch has done it
        for direction in (layer, layer.inverse, layer.eval()):
            direction(normal(8, 3).float())
    assert sum(looks) == 2


def test_at_least_one_channel():
    with pytest.raises(ValueError, match="channels must be at least 1, got 0"):
        nn.ActNorm(0)
