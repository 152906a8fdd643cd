"""MixedSplineCoupling: a spline for each channel."""

import pytest
import torch
from laws import normal, randomize
from torch.nn import Linear

from pyflowkern import nn, ops
from pyflowkern.ops import SplineMap

ANGLE = SplineMap(bins=4, tails="circular", bound=torch.pi)
SPLINES = [
    ANGLE,
    SplineMap(bins=4, bound=2.0),
    SplineMap("cubic", bins=3),
    SplineMap(bins=4, tails="affine", parameterization="domain", bound=2.0),
    SplineMap(bins=4, tails="affine", parameterization="domain", bound=3.0),
    SplineMap(bins=4, bound=5.0),
    SplineMap(bins=4, tails="circular", bound=2.0),
]


@pytest.mark.parametrize(
    "mask", [[1, 1, 1, 1, 1, 1, 0], [0, 0, 1, 0, 1, 1, 1], [1, 0, 0, 0, 0, 1, 0]]
)
@pytest.mark.parametrize("swap", [False, True])
def test_each_channel_has_its_spline(backend, mask, swap):
    split = torch.tensor(mask, dtype=torch.bool)
    layer = nn.MixedSplineCoupling(7, nn.MLP, SPLINES, split=split, swap=swap)
    layer = randomize(layer, 1.0).double().to(backend)
    x = 1.5 * normal(50, 7).to(backend)
    moved = (split ^ swap).nonzero().flatten().tolist()
    assert layer.moved == moved
    params = layer.conditioner(x[:, (~(split ^ swap)).to(backend)])
    expected, total, at = x.clone(), 0, 0
    for c in moved:
        smap = SPLINES[c]
        own = params[:, None, at : at + smap.params]
        expected[:, c : c + 1], log_det = ops.spline(x[:, c : c + 1], own, smap)
        total, at = total + log_det, at + smap.params
    assert at == params.shape[1]
    z, log_det = layer(x)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(log_det, total, rtol=1e-9, atol=1e-9)


def test_one_op_runs_for_splines_that_differ_in_their_bounds(monkeypatch):
    calls = []
    spline = ops.spline
    monkeypatch.setattr(ops, "spline", lambda *a, **k: calls.append(a[2]) or spline(*a, **k))
    splines = [SplineMap(bins=3, bound=b) for b in (1.0, 2.0, 3.0, 4.0)]
    layer = nn.MixedSplineCoupling(4, nn.MLP, splines)
    layer(torch.randn(5, 4))
    assert calls == [SplineMap(bins=3, bound=1.0)]
    calls.clear()
    nn.MixedSplineCoupling(4, nn.MLP, [SplineMap(bins=3)] * 4)(torch.randn(5, 4))
    assert calls == [SplineMap(bins=3)]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"splines": [ANGLE]}, ValueError, "splines must be 4, one a channel, got 1"),
        ({"splines": ANGLE}, TypeError, "splines must be a list, got SplineMap"),
        (
            {"splines": [ANGLE, "circular", ANGLE, ANGLE]},
            TypeError,
            r"splines\[1\] must be a SplineMap, got str",
        ),
        ({"split": "checkerboard"}, ValueError, "split must be 'channel' or a boolean mask"),
        ({"split": torch.zeros(4, dtype=torch.bool)}, ValueError, "split must let a channel pass"),
        ({"conditioner": 3}, TypeError, "conditioner must be"),
    ],
)
def test_wrong_arguments(options, error, message):
    with pytest.raises(error, match=message):
        nn.MixedSplineCoupling(
            **({"channels": 4, "conditioner": nn.MLP, "splines": [ANGLE] * 4} | options)
        )


def test_images_are_refused_and_own_networks_keep_their_weights():
    layer = nn.MixedSplineCoupling(4, Linear(2, 2 * ANGLE.params), [ANGLE] * 4)
    assert layer.conditioner.weight.any()
    with pytest.raises(ValueError, match=r"x must have shape \[N, 4\], got \(2, 4, 3\)"):
        layer(torch.zeros(2, 4, 3))
