"""Solves that fail: they end early with a status, and do not harm other samples."""

import math

import pytest
import torch

from pyflowkern import ode

CONTROLS = [{"control": "batch"}, {"control": "device"}, {"control": "sample"}]
SOLVES = [*CONTROLS, {"adjoint": "reversible"}]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("settings_of_solve", SOLVES, ids=str)
def test_a_solve_reaches_a_pole_to_the_last_bit_of_the_time(settings_of_solve, dtype):
    y0 = torch.tensor([[0.1], [3.0]], dtype=dtype)  # y' = y^2 has its pole at 1 / y0
    found = ode.solve(
        lambda t, y: y * y, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5, **settings_of_solve
    )
    assert int(torch.as_tensor(found.status).max()) == ode.Status.dt_underflow
    assert found.stats.accepted + found.stats.rejected < 400
    assert found.ys[-1, 1] > 1e14


@pytest.mark.parametrize("settings_of_solve", CONTROLS, ids=str)
def test_a_first_step_out_of_the_fields_domain_is_shortened(settings_of_solve):
    # the trial Euler step, from which the first step size is chosen, leads below zero
    def fall(t, y):
        return torch.where(y < 0.999, math.inf, -1e-9 * y)

    found = ode.solve(fall, torch.ones(3, 1, dtype=torch.float64), [0.0, 1.0], **settings_of_solve)
    assert found.ok
    torch.testing.assert_close(found.ys[-1], torch.full((3, 1), 1 - 1e-9, dtype=torch.float64))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -1.0])
def test_a_failed_sample_leaves_the_gradients_of_the_others_alone(bad):
    # y' = -w sqrt(y): sqrt(y1) = sqrt(y0) - w / 2, and the root of a negative state is NaN
    w = torch.ones((), dtype=torch.float64, requires_grad=True)
    y0 = torch.tensor([[bad], [1.0], [2.0]], dtype=torch.float64, requires_grad=True)
    found = ode.solve(lambda t, y: -w * y.sqrt(), y0, [0.0, 0.5, 1.0], control="sample")
    assert found.status.tolist() == [ode.Status.non_finite, 0, 0]
    loss, root = found.ys[-1, 1:].sum(), torch.tensor([1.0, 2.0], dtype=torch.float64).sqrt()
    for create_graph in (False, True):
        of_w, of_y = torch.autograd.grad(
            loss, (w, y0), retain_graph=True, create_graph=create_graph
        )
        torch.testing.assert_close(of_w, -(root - 0.5).sum(), rtol=1e-6, atol=0)
        torch.testing.assert_close(of_y[1:, 0], 1 - 0.5 / root, rtol=1e-6, atol=0)
        assert of_y[0, 0] == 0
    (second,) = torch.autograd.grad(of_w, w)
    torch.testing.assert_close(second, torch.ones_like(second), rtol=1e-6, atol=0)


def into_a_pole(dtype=torch.float64, most=math.inf):
    """y' = a y^2 from 1 and 1/2: a pole at t = 1, and nothing beyond ``most``."""
    a = torch.ones((), dtype=dtype, requires_grad=True)
    y0 = torch.tensor([1.0, 0.5], dtype=dtype, requires_grad=True)
    return (lambda t, y: torch.where(y < most, a * y * y, math.nan)), y0, a


@pytest.mark.parametrize("settings_of_solve", [{}, {"method": "rk4", "step_size": 0.05}], ids=str)
@pytest.mark.parametrize(
    ("dtype", "most"), [(torch.float32, math.inf), (torch.float64, math.inf), (torch.float64, 1e3)]
)
def test_reversible_gradients_up_to_a_pole_are_those_of_the_accepted_steps(
    settings_of_solve, dtype, most
):
    field, y0, a = into_a_pole(dtype, most)
    settings = {"rtol": 1e-6, "atol": 1e-6, "adjoint": "reversible"} | settings_of_solve
    found = ode.solve(field, y0, [0.0, 0.5, 2.0], **settings)
    assert found.status in (ode.Status.dt_underflow, ode.Status.non_finite)
    loss = found.ys.sum()
    plain = torch.autograd.grad(loss, (y0, a), retain_graph=True)
    assert all(torch.isfinite(g).all() for g in plain)
    # without this limit the gradient is as sensitive as the state is close to the pole
    if most < math.inf:
        recorded = torch.autograd.grad(loss, (y0, a), create_graph=True)  # a replay by autograd
        for one, other in zip(plain, recorded, strict=True):
            torch.testing.assert_close(one, other, rtol=1e5 * torch.finfo(dtype).eps, atol=0)


@pytest.mark.parametrize("method", ["dopri5", "tsit5"])
def test_reversible_gradients_of_a_solve_cut_short_before_a_pole(method):
    """At a state of 1e3 reversing the steps loses all digits in float32; repeating them does not."""
    field, y0, a = into_a_pole(torch.float32)
    found = ode.solve(field, y0, [0.0, 3.0], method=method, adjoint="reversible",
                      rtol=1e-5, atol=1e-5, max_steps=60)  # fmt: skip
    assert found.status == ode.Status.max_steps
    loss = found.ys[-1].sum()
    plain = torch.autograd.grad(loss, (y0, a), retain_graph=True)
    recorded = torch.autograd.grad(loss, (y0, a), create_graph=True)  # a replay by autograd
    for one, other in zip(plain, recorded, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-2, atol=0)


EARLY = [{"max_steps": 12}, {"method": "rk4", "step_size": 0.05, "max_steps": 12}]


@pytest.mark.parametrize("control", ["batch", "device"])
@pytest.mark.parametrize("settings_of_solve", [{"most": 30.0}, *EARLY], ids=str)
def test_the_continuous_adjoint_starts_where_the_solve_ended(settings_of_solve, control):
    field, y0, a = into_a_pole(most=settings_of_solve.get("most", math.inf))
    settings = {name: value for name, value in settings_of_solve.items() if name != "most"}
    if "method" not in settings_of_solve:
        settings["control"] = control
    found = []
    for adjoint in ("direct", "continuous"):
        t = torch.tensor([0.0, 0.2, 2.0, 3.0], dtype=torch.float64, requires_grad=True)
        s = ode.solve(field, y0, t, rtol=1e-9, atol=1e-9, adjoint=adjoint, **settings)
        assert not s.ok
        found.append(torch.autograd.grad(s.ys[1:].sum(), (y0, a, t)))
    for of_flow, of_steps in zip(*found, strict=True):
        # the error of rk4 steps of 0.05
        torch.testing.assert_close(
            of_flow, of_steps, rtol=1e-3 if "method" in settings_of_solve else 1e-5, atol=0
        )
    assert found[0][2][1] != 0
    assert found[0][2][2:].tolist() == [0, 0], "times that were not reached have no gradient"


def test_the_continuous_adjoint_warns_where_it_cannot_start():
    field, y0, a = into_a_pole()
    s = ode.solve(field, y0, [0.0, 2.0], rtol=1e-6, atol=1e-6, adjoint="continuous")
    assert s.status == ode.Status.dt_underflow
    with pytest.warns(RuntimeWarning, match="adjoint solve ended early"):
        grads = torch.autograd.grad(s.ys[-1].sum(), (y0, a))
    assert all(g.isnan().all() for g in grads)


def test_a_failing_fixed_step_is_not_reported_as_max_steps():
    field, y0, _ = into_a_pole(most=30.0)
    s = ode.solve(field, y0, [0.0, 2.0], method="rk4", step_size=0.05, max_steps=39)
    assert s.status == ode.Status.non_finite


@pytest.mark.parametrize("compat", [None, "torchdiffeq"])
@pytest.mark.parametrize("step_size", [1e-9, 1e-300])
def test_far_too_many_fixed_steps_are_never_listed(step_size, compat):
    found = ode.solve(
        lambda t, y: -y, torch.ones(1), [0.0, 0.5, 1.0], method="euler", step_size=step_size,
        max_steps=5, compat=compat,
    )  # fmt: skip
    assert found.status == ode.Status.max_steps
    assert found.stats.accepted == 5
    assert torch.isfinite(found.ys).all()


@pytest.mark.parametrize("compat", [None, "torchdiffeq"])
@pytest.mark.parametrize(("most", "status"), [(10, ode.Status.ok), (9, ode.Status.max_steps)])
def test_the_last_allowed_step_is_taken(most, status, compat):
    t = [0.0, 0.4, 1.0]
    settings = {"method": "euler", "step_size": 0.1, "max_steps": most, "compat": compat}
    found = ode.solve(lambda t, y: torch.ones_like(y), torch.zeros(1), t, **settings)
    assert found.status == status
    torch.testing.assert_close(found.ys[:, 0], torch.tensor([0.0, 0.4, most / 10]))


@pytest.mark.parametrize("settings_of_solve", SOLVES, ids=str)
def test_tolerances_that_are_both_zero_are_refused(settings_of_solve):
    def decay(t, y):
        return -y

    with pytest.raises(ValueError, match="must not both be 0"):
        ode.solve(decay, torch.ones(3, 1), [0.0, 1.0], rtol=0, atol=0.0, **settings_of_solve)
    pair = (torch.ones(3, 1), torch.ones(3, 1))
    with pytest.raises(ValueError, match="must not both be 0"):
        ode.solve(
            lambda t, y: (-y[0], -y[1]),
            pair,
            [0.0, 1.0],
            rtol=(1e-3, 0),
            atol=(0, 0),
            **settings_of_solve,
        )
    with pytest.raises(ValueError, match="must not both be 0"):
        ode.odeint_event(decay, pair[0], 0.0, event_fn=lambda t, y: y[0] - 0.5, rtol=0, atol=0)


def test_fixed_steps_need_no_tolerance():
    assert ode.solve(lambda t, y: -y, torch.ones(1), [0.0, 1.0], method="rk4", rtol=0, atol=0).ok
