"""Steps of angles, of several maps and of scales with mean 0: what they are, and what is refused."""

import math

import pytest
import torch
from laws import normal
from laws.angles import ANGLE, LINE, SOFTCLIP, coupling, masked

from pyflowkern import ops
from pyflowkern.ops import ChainLayer, ChainNetwork, ChainProgram, ElementsStep, ScaleMap


def read_angle(x, frequency):
    """What a network reads of an angle: cosine and sine, each of which is a shift of another feature."""
    net = ChainNetwork([ChainLayer(2, 2, bias=False)], frequencies=[frequency])
    program = ChainProgram(3, [ElementsStep("additive", [1, 2], [0], net)])
    given = torch.stack([x, torch.zeros_like(x), torch.zeros_like(x)], 1)
    return ops.chain(given, program, [torch.eye(2, dtype=x.dtype)])[0][:, 1:]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_angles_of_any_size(backend, dtype):
    near = torch.linspace(-20, 20, 1001, dtype=torch.float64)
    ends = torch.tensor([0.0, -0.0, 1e-30, 8192.0, -8193.5, 3e5, 1.1e6, 1e15], dtype=torch.float64)
    x = torch.cat([near, near * math.pi / 4, ends]).to(dtype)
    want = torch.stack([x.double().cos(), x.double().sin()], 1)
    torch.testing.assert_close(
        read_angle(x, 1.0).double(), want, rtol=0, atol=4 * torch.finfo(dtype).eps
    )
    bad = torch.tensor([math.inf, -math.inf, math.nan], dtype=dtype)
    mixed = torch.cat([x[:5], bad, x[5:]])
    found = read_angle(mixed, 1.0)
    assert found[5:8].isnan().all()
    assert torch.equal(torch.cat([found[:5], found[8:]])[:5], read_angle(x, 1.0)[:5])


def test_inverses_of_turned_splines_end_on_the_circle(backend):
    """Beyond the interval, too, the log-determinant is minus that of the way forward."""
    program = ChainProgram(3, [masked(SOFTCLIP, [2, 0, 1], turned=True, activation="elu")])
    tensors = [0.7 * normal(*w.shape, seed=i) for i, w in enumerate(program.tensors)]
    z = torch.tensor([[3.5, -0.4, 1.0], [9.0, -3.2, 2.0], [0.5, 2.9, -2.9], [-3.01, 3.01, 30.0]])
    x, log_det = ops.chain(z.double(), program, tensors, inverse=True)
    assert (x.abs() <= SOFTCLIP.bound).all()
    back, forward = ops.chain(x, program, tensors)
    torch.testing.assert_close(log_det, -forward, rtol=1e-10, atol=1e-10)
    inside = z.abs() <= SOFTCLIP.bound
    torch.testing.assert_close(back[inside], z.double()[inside], rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_huge_angles_stay_on_the_circle(backend, dtype):
    """Numbers many turns apart are neighbours there: they may be any angle, but no number beyond."""
    program = ChainProgram(3, [masked(SOFTCLIP, [2, 0, 1], turned=True, activation="elu")])
    tensors = [0.7 * normal(*w.shape, seed=i, dtype=dtype) for i, w in enumerate(program.tensors)]
    x = 10 ** torch.linspace(6, 37, 3000, dtype=dtype).view(1000, 3)
    x = torch.cat([x, -x])
    for inverse in (False, True):
        z, log_det = ops.chain(x, program, tensors, inverse=inverse)
        assert (z.abs() <= SOFTCLIP.bound * (1 + 1e-6)).all()
        assert log_det.isfinite().all()


@pytest.mark.parametrize("inverse", [False, True])
def test_scales_of_mean_zero_preserve_volume(backend, inverse):
    step = coupling(ScaleMap("softplus", eps=1e-3), [0, 2, 3], [1], centred=True)
    program = ChainProgram(4, [step])
    tensors = [normal(*w.shape, seed=i) for i, w in enumerate(program.tensors)]
    x = normal(5, 4, seed=9)
    z, log_det = ops.chain(x, program, tensors, inverse=inverse)
    assert not log_det.any()
    jacobian = torch.func.jacfwd(
        lambda row: ops.chain(row[None], program, tensors, inverse=inverse)[0][0]
    )
    torch.testing.assert_close(torch.linalg.slogdet(jacobian(x[0]))[1], z.new_zeros(()))
    assert not torch.allclose(z, x)


def test_what_outputs_see_is_told_in_numbers_that_are_read():
    net = ChainNetwork([ChainLayer(5, 4, prefixes=[0, 1, 2, 3, 4])], frequencies=[0, 2.0, 0])
    assert net.inputs == 3
    assert net.seen() == [0, 1, 2, 2, 3]


def test_maps_that_are_all_the_same_are_one():
    step = ElementsStep([LINE, LINE], [1, 0])
    assert step == ElementsStep(LINE, [1, 0])
    assert (step.parameters, step.outputs) == (LINE.params, 2 * LINE.params)
    several = ElementsStep([LINE, ANGLE, ScaleMap("exp")], [1, 0, 2])
    assert several.outputs == LINE.params + ANGLE.params + 2
    assert several.parameters == max(LINE.params, ANGLE.params)
    assert len(several.groups) == 3


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (
            lambda: ChainNetwork([ChainLayer(2, 2)], frequencies=[0.0]),
            ValueError,
            "must make the 2 inputs",
        ),
        (
            lambda: ChainNetwork([ChainLayer(2, 2)], frequencies=[math.inf]),
            ValueError,
            "must be finite",
        ),
        (
            lambda: ChainNetwork([ChainLayer(2, 2)], frequencies=["1"]),
            TypeError,
            r"frequencies\[0\]",
        ),
        (
            lambda: ChainNetwork([ChainLayer(2, 2)], activate_blocks=False),
            ValueError,
            "is for residual",
        ),
        (lambda: ElementsStep([LINE], [0, 1]), ValueError, "transform must be 2 maps, got 1"),
        (
            lambda: ElementsStep([LINE, ANGLE], [0, 1], layout="blocked"),
            ValueError,
            "layout must be",
        ),
        (
            lambda: ElementsStep("additive", [0], centred=True),
            ValueError,
            "centred=True needs one scale map",
        ),
        (
            lambda: ElementsStep(LINE, [0], centred=True),
            ValueError,
            "centred=True needs one scale map",
        ),
        (lambda: ElementsStep("exp", [0], centred=1), TypeError, "centred"),
        (lambda: ElementsStep(ANGLE, [0], turned=True), ValueError, "turned=True needs splines"),
        (lambda: ElementsStep("exp", [0], turned=True), ValueError, "turned=True needs splines"),
    ],
)
def test_what_does_not_fit_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
