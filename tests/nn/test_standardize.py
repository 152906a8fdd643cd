"""Standardize: mean 0 and variance 1 over the data that it was given."""

import copy
import pickle
import warnings

import pytest
import torch
from laws import normal

from pyflowkern import flows, nn


def data(*shape, dtype=torch.float64):
    offsets = torch.tensor([5.0, -300.0, 0.0], dtype=dtype)
    scales = torch.tensor([0.01, 20.0, 1.0], dtype=dtype)
    views = (-1, *[1] * (len(shape) - 2))
    return normal(*shape, dtype=dtype) * scales.view(views) + offsets.view(views)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(200, 3), (50, 3, 4), (20, 3, 2, 5)])
def test_the_data_get_mean_zero_and_variance_one(backend, shape, dtype):
    x = data(*shape, dtype=dtype).to(backend)
    layer = nn.Standardize.from_data(x)
    assert layer.log_scale.dtype == dtype
    z, log_det = layer(x)
    axes = [0, *range(2, x.dim())]
    torch.testing.assert_close(z.mean(axes), torch.zeros_like(layer.mean), atol=1e-3, rtol=0)
    torch.testing.assert_close(
        z.var(axes, correction=0), torch.ones_like(layer.std), atol=1e-4, rtol=0
    )
    space = x[0, 0].numel()
    torch.testing.assert_close(log_det, (-space * layer.std.log().sum()).expand(len(x)))
    torch.testing.assert_close(layer.mean, x.mean(axes))
    torch.testing.assert_close(layer.std, x.std(axes, correction=0))
    torch.testing.assert_close(layer.inverse(z)[0], x)


def test_constant_channels_keep_their_scale_and_bad_samples_are_left_out():
    x = data(40, 3)
    x[:, 1] = 7.0
    expected = nn.Standardize.from_data(x)
    assert expected.std[1] == 1
    assert expected.mean[1] == 7
    bad = torch.cat([x, x[:2]])
    bad[40, 0], bad[41, 2] = torch.nan, torch.inf
    torch.testing.assert_close(nn.Standardize.from_data(bad).state_dict(), expected.state_dict())
    one = nn.Standardize.from_data(x[:1])
    assert one.std.tolist() == [1, 1, 1]
    assert not one(x[:1])[0].any()


def test_copies_files_precision_and_resets():
    layer = nn.Standardize(3).fit(data(30, 3, dtype=torch.float32))
    x = data(5, 3, dtype=torch.float32)
    fresh = nn.Standardize(3)
    assert torch.equal(fresh(x)[0], x)
    fresh.load_state_dict(layer.state_dict())
    for other in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer)), fresh):
        torch.testing.assert_close(other(x), layer(x), rtol=0, atol=0)
    mean = layer.mean.clone()
    half = layer.bfloat16()
    assert torch.equal(half.mean, mean)
    assert half(x.bfloat16())[0].dtype == torch.bfloat16
    assert not list(layer.parameters())
    layer.reset_parameters()
    assert torch.equal(layer(x)[0], x)


def test_flows_are_standardized_in_place():
    x = data(500, 3, dtype=torch.float32)
    flow = flows.MAF(3, transforms=2, hidden=8)
    plain = copy.deepcopy(flow)
    assert flow.standardize(x) is flow
    first = flow.bijection[0]
    expected = plain.log_prob(first(x)[0]) + first(x)[1]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        torch.testing.assert_close(flow.log_prob(x), expected)
    assert flow.standardize(2 * x) is flow
    assert len(flow.bijection) == 3
    torch.testing.assert_close(flow.bijection[0].mean, 2 * x.mean(0), rtol=1e-4, atol=1e-4)
    other = flows.MAF(3, transforms=2, hidden=8).standardize()
    other.load_state_dict(flow.state_dict())
    torch.testing.assert_close(other.log_prob(x), flow.log_prob(x), rtol=0, atol=0)
    assert (
        flows.MAF(3, transforms=2, hidden=8).double().standardize().bijection[0].bias.dtype
        == torch.float64
    )


def test_continuous_flows_take_it_too():
    x = data(20, 3)
    flow = flows.CNF(3, (6,), divergence="exact", method="rk4", step_size=0.25).double()
    plain = copy.deepcopy(flow)
    z, log_det = flow.standardize(x).bijection[0](x)
    torch.testing.assert_close(flow.log_prob(x), plain.log_prob(z) + log_det)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: nn.Standardize(0), ValueError, "channels must be at least 1"),
        (
            lambda: nn.Standardize(2).fit(torch.zeros(4, 3)),
            ValueError,
            "data must have 2 channels",
        ),
        (lambda: nn.Standardize.from_data([1.0]), TypeError, "data must be a torch.Tensor"),
        (
            lambda: nn.Standardize.from_data(torch.zeros(0, 3)),
            ValueError,
            "data must have a finite sample",
        ),
        (lambda: nn.Standardize(1).fit(torch.tensor([[torch.nan]])), ValueError, "got none of 1"),
        (
            lambda: flows.NSF(2, circular=True).standardize(),
            ValueError,
            "standardize needs a flow on the real",
        ),
        (lambda: flows.FlowMatching(2, (4,)).standardize(), ValueError, "trained by its density"),
    ],
)
def test_wrong_arguments(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_standardizing_a_flow_keeps_modes_and_what_hangs_on_it():
    flow = flows.MAF(2, transforms=2, hidden=4)
    flow.bijection[1].eval()
    flow.standardize(torch.randn(9, 2))
    assert flow.bijection.training
    assert flow.bijection[0].training
    assert not flow.bijection[2].training
    whole = flow.bijection
    flow.standardize(torch.randn(9, 2))
    assert flow.bijection is whole
    with pytest.raises(ValueError, match=r"data must have shape \[N, 2\], got \(9, 2, 5\)"):
        flow.standardize(torch.randn(9, 2, 5))
