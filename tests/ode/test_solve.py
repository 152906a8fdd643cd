"""Outputs, states, times, statuses, settings and bad input of the solvers."""

import math
import warnings

import pytest
import torch

from pyflowkern import ode
from pyflowkern.ode.tableaus import TABLEAUS, coefficients

METHODS = sorted(TABLEAUS)
ADAPTIVE = [name for name in METHODS if TABLEAUS[name].error is not None]


def decay(t, y):
    return -y


def start(*shape, dtype=torch.float64):
    return 1 + torch.arange(math.prod(shape), dtype=torch.float64).view(shape).to(dtype) / 7


# --- outputs -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", METHODS)
def test_outputs_at_all_times(name):
    """exp(-t) at several times, in both directions, to the method's accuracy."""
    fixed = {} if name in ADAPTIVE else {"step_size": 1e-3}
    floor = {"euler": 2e-3, "midpoint": 1e-6, "heun": 1e-6}.get(name, 2e-6)
    allowed = {"rtol": 1e-8, "atol": 1e-8}
    if name in ("adaptive_heun", "fehlberg2"):  # of order 2: 1e-8 would take 10,000 steps
        allowed, floor = {"rtol": 1e-6, "atol": 1e-6}, 1e-3
    for ts in ([0.0, 0.1, 0.11, 0.7, 2.0], [1.0, 0.9, 0.3, -1.0]):
        y = ode.odeint(decay, start(3, 2), ts, method=name, **allowed, **fixed)
        assert y.shape == (len(ts), 3, 2)
        assert torch.equal(y[0], start(3, 2))
        exact = start(3, 2) * torch.exp(ts[0] - torch.tensor(ts).double())[:, None, None]
        torch.testing.assert_close(y, exact, rtol=floor, atol=0)


@pytest.mark.parametrize("name", ADAPTIVE)
def test_outputs_cost_no_steps(name):
    few = ode.solve(decay, start(3), [0.0, 2.0], method=name)
    many = ode.solve(decay, start(3), torch.linspace(0, 2, 50).double(), method=name)
    assert many.stats == few.stats
    torch.testing.assert_close(many.ys[-1], few.ys[-1])


@pytest.mark.parametrize("name", METHODS)
def test_dense_output_is_the_state_at_any_time(name):
    fixed = {} if name in ADAPTIVE else {"step_size": 0.01}
    for ts in ([0.0, 2.0], [2.0, 0.0]):
        s = ode.solve(decay, start(2), ts, method=name, dense=True, rtol=1e-7, atol=1e-7, **fixed)
        for t in (0.0, 0.013, 1.0, 1.7, 2.0):
            exact = start(2) * math.exp(ts[0] - t)
            tolerance = {"euler": 2e-2, "fehlberg2": 3e-4}.get(name, 1e-4)
            torch.testing.assert_close(s.dense(t), exact, rtol=tolerance, atol=0)
        with pytest.raises(ValueError, match="between"):
            s.dense(2.5)


def test_the_field_is_never_evaluated_beyond_the_end():
    seen = []

    def field(t, y):
        seen.append(t.item())
        return -y

    ode.odeint(field, start(2), [0.25, 1.0], first_step=0.1)
    assert min(seen) == 0.25
    assert max(seen) == 1.0
    seen.clear()
    ode.odeint(field, start(2), [1.0, 0.25])
    assert max(seen) == 1.0
    assert min(seen) >= 0.25


@pytest.mark.parametrize("fixed", [{}, {"method": "rk4", "step_size": 0.1}], ids=str)
def test_dense_output_over_an_empty_interval_is_the_first_state(fixed):
    y0 = (torch.ones(2), torch.zeros(3))
    s = ode.solve(lambda t, y: (-y[0], y[1]), y0, [1.0, 1.0], dense=True, **fixed)
    for found, first in zip(s.dense(1.0), y0, strict=True):
        assert torch.equal(found, first)
    with pytest.raises(ValueError, match=r"between 1\.0 and 1\.0"):
        s.dense(0.5)


@pytest.mark.parametrize("name", METHODS)
@pytest.mark.parametrize("compat", [None, "torchdiffeq"])
def test_empty_intervals_and_repeated_outputs(name, compat):
    """No interval, or several outputs at one time."""
    s = ode.solve(decay, start(2), [1.0, 1.0, 1.0], method=name, compat=compat)
    assert s.ok
    assert torch.equal(s.ys, start(2).expand(3, 2))
    s = ode.solve(decay, start(2), [0.0, 0.5, 0.5, 1.0, 1.0], method=name, compat=compat)
    assert torch.equal(s.ys[1], s.ys[2])
    torch.testing.assert_close(s.ys[3], s.ys[4], rtol=1e-14, atol=0)
    assert torch.equal(ode.odeint(decay, start(2), [1.0], method=name), start(1, 2)[:, :2])


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
@pytest.mark.parametrize("control", ["batch", "sample"])
def test_tuples_are_solved_as_one_state(name, control):
    if name == "rk4" and control == "sample":
        pytest.skip("no step control")
    x, log_det = start(5, 3), start(5)

    def pair(t, state):
        a, b = state
        assert a.shape == (5, 3)
        assert b.shape == (5,)
        return -a, 2 * b

    ts = [0.0, 0.5, 1.0]
    fixed = {"step_size": 0.01} if name == "rk4" else {"control": control}
    ys = ode.odeint(pair, (x, log_det), ts, method=name, **fixed)
    assert isinstance(ys, tuple)
    torch.testing.assert_close(ys[0][-1], x * math.exp(-1), rtol=1e-6, atol=0)
    torch.testing.assert_close(ys[1][1], log_det * math.e, rtol=1e-6, atol=0)


def test_half_precision_is_integrated_in_float32():
    seen = []

    def field(t, y):
        seen.append((t.dtype, y.dtype))
        return -y

    y = ode.odeint(field, start(4, dtype=torch.bfloat16), [0.0, 1.0], method="rk4", step_size=0.01)
    assert y.dtype == torch.bfloat16
    assert set(seen) == {(torch.float32, torch.bfloat16)}
    expected = start(4, dtype=torch.bfloat16).double() * math.exp(-1)
    # in bfloat16 the state would not move: each of 100 steps changes it by less than its rounding
    torch.testing.assert_close(y[-1].double(), expected, rtol=2**-7, atol=0)


@pytest.mark.parametrize("name", METHODS)
def test_layouts_and_empty_states(name):
    y = start(4, 6)
    expected = ode.odeint(decay, y, [0.0, 1.0], method=name)
    for other in (
        y.t().contiguous().t(),
        y[:, None].expand(4, 1, 6)[:, 0],
        torch.stack((y, y), -1)[..., 0],
    ):
        assert torch.equal(ode.odeint(decay, other, [0.0, 1.0], method=name), expected)
    empty = ode.solve(decay, start(0, 3), [0.0, 1.0], method=name)
    assert empty.ok
    assert empty.ys.shape == (2, 0, 3)


def test_scalars_and_integer_results():
    y = ode.odeint(lambda t, y: torch.ones_like(y), torch.zeros(()).double(), [0.0, 2.0])
    assert y[-1].item() == pytest.approx(2.0, rel=1e-12)


# --- statuses ------------------------------------------------------------------------------------


def blow_up(t, y):
    """y' = y^2: the solution 1 / (1 - t) has a pole at 1."""
    return y * y


@pytest.mark.parametrize("control", ["batch", "sample"])
@pytest.mark.parametrize("name", ADAPTIVE)
def test_an_explosion_ends_with_a_status_and_finite_numbers(name, control):
    allowed = (
        1e-5 if name in ("adaptive_heun", "fehlberg2") else 1e-8
    )  # of order 2: many small steps
    s = ode.solve(blow_up, torch.ones(1, 1), [0.0, 0.5, 2.0], method=name, control=control,
                  rtol=allowed, atol=allowed)  # fmt: skip
    assert not s.ok
    assert int(s.status) in (ode.Status.dt_underflow, ode.Status.non_finite, ode.Status.max_steps)
    assert torch.isfinite(s.ys).all()
    assert s.ys[1].item() == pytest.approx(2.0, rel=max(1e-4, 500 * allowed))
    assert s.ys[2].item() > 1e3


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_max_steps(control):
    """A stiff equation, whose steps stay as small as stability requires."""
    s = ode.solve(lambda t, y: -1e6 * (y - torch.cos(t)[..., None] if y.dim() > t.dim() + 0 else y),
                  torch.ones(1, 1).double(), [0.0, 10.0], max_steps=200, control=control)  # fmt: skip
    assert int(s.status) == ode.Status.max_steps
    assert torch.isfinite(s.ys).all()
    assert s.stats.accepted + s.stats.rejected == 200


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_a_field_that_becomes_nan(control):
    """The field is NaN from some time on: the solve ends before it, with the last finite state."""

    def wall(t, y):
        return torch.where(y < 2, torch.ones_like(y), torch.nan)

    s = ode.solve(wall, torch.ones(1, 1).double(), [0.0, 0.5, 5.0], control=control)
    assert int(s.status) == ode.Status.non_finite
    assert s.ys[1].item() == pytest.approx(1.5)
    assert s.ys[2].item() == pytest.approx(2.0, abs=1e-3)


@pytest.mark.parametrize("control", ["batch", "sample"])
def test_nan_from_the_start(control):
    y0 = torch.ones(2, 1)
    s = ode.solve(lambda t, y: y * torch.nan, y0, [0.0, 1.0], control=control)
    assert bool((torch.as_tensor(int(s.status) if control == "batch" else s.status) == 3).all())
    assert torch.equal(s.ys[-1], y0)


@pytest.mark.parametrize("name", METHODS)
def test_fixed_steps_stop_at_the_last_finite_state(name):
    s = ode.solve(lambda t, y: torch.where(t < 0.55, -y, torch.inf * y), start(2), [0.0, 0.3, 1.0],
                  method=name, step_size=0.1)  # fmt: skip
    assert s.status == ode.Status.non_finite
    assert torch.isfinite(s.ys).all()
    # depending on whether the last stage lies at the end of the step
    assert s.stats.accepted in (
        5,
        6,
    )


def test_a_failing_training_step_does_not_raise():
    weight = torch.tensor(1.0, requires_grad=True)
    for adjoint in ("direct", "continuous", "reversible"):
        s = ode.solve(lambda t, y: weight * y * y, torch.ones(1), [0.0, 2.0], adjoint=adjoint,
                      rtol=1e-4, atol=1e-4, max_steps=60)  # fmt: skip
        assert not s.ok
        assert torch.isfinite(s.ys).all()
    s = ode.solve(lambda t, y: weight * y * y, torch.ones(1), [0.0, 2.0], max_steps=10)
    s.ys[-1].sum().backward()
    assert torch.isfinite(weight.grad)


def test_overflow_of_the_state_is_not_accepted():
    """A finite error over an infinite scale would look like zero."""
    s = ode.solve(lambda t, y: torch.full_like(y, 3e38), torch.full((1,), 3e38), [0.0, 1.0])
    assert not s.ok
    assert torch.isfinite(s.ys).all()


def test_odeint_warns():
    with pytest.warns(RuntimeWarning, match="max_steps"):
        ode.odeint(decay, torch.ones(1), [0.0, 100.0], max_steps=3)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ode.odeint(decay, torch.ones(1), [0.0, 1.0])


def test_min_and_max_step():
    s = ode.solve(decay, start(1), [0.0, 1.0], max_step=0.01)
    assert s.stats.accepted >= 100
    s = ode.solve(
        blow_up, torch.ones(1).double(), [0.0, 0.9], min_step=0.1, rtol=1e-12, atol=1e-12
    )
    assert s.ok
    assert s.stats.accepted <= 10


# --- bad input -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("error", "arguments", "settings", "text"),
    [
        (TypeError, (decay, torch.ones(2, dtype=torch.int64), [0.0, 1.0]), {}, "floating"),
        (TypeError, (decay, [1.0], [0.0, 1.0]), {}, "y0"),
        (ValueError, (decay, (), [0.0, 1.0]), {}, "y0"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0, 0.5]), {}, "monotone"),
        (ValueError, (decay, torch.ones(2), [0.0, math.inf]), {}, "finite"),
        (ValueError, (decay, torch.ones(2), torch.ones(2, 2)), {}, "one axis"),
        (ValueError, (decay, torch.ones(2), []), {}, "at least one"),
        (TypeError, (decay, torch.ones(2), torch.tensor([0, 1])), {}, "floating"),
        (TypeError, (decay, torch.ones(2), 1.0), {}, "t must"),
        (ValueError, (decay, torch.ones(2), [0.0, 1e300]), {}, "range"),
        (TypeError, (None, torch.ones(2), [0.0, 1.0]), {}, "func"),
        (TypeError, (decay, torch.ones(2), [0.0, 1.0]), {"step_size": "small"}, "step_size"),
        (TypeError, (decay, torch.ones(2), [0.0, 1.0]), {"max_step": None}, "max_step"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"rtol": torch.ones(3)}, "broadcast"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"method": "rk5"}, "method"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"adjoint": "x"}, "adjoint"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"rtol": -1.0}, "rtol"),
        (TypeError, (decay, torch.ones(2), [0.0, 1.0]), {"atol": "small"}, "atol"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"rtol": (1e-3, 1e-3)}, "rtol"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"step_size": 0.0}, "step_size"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"max_steps": 0}, "max_steps"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"control": "x"}, "control"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"compat": "x"}, "compat"),
        (ValueError, (decay, torch.ones(2), [0.0, 1.0]), {"coupling": 2.0}, "coupling"),
        (ValueError, (decay, torch.ones(()), [0.0, 1.0]), {"control": "sample"}, "batch axis"),
        (
            ValueError,
            (decay, torch.ones(2), [0.0, 1.0]),
            {"control": "sample", "method": "rk4"},
            "error weights",
        ),
        (ValueError, (lambda t, y: y[:1], torch.ones(2), [0.0, 1.0]), {}, "shape"),
        (TypeError, (lambda t, y: 1.0, torch.ones(2), [0.0, 1.0]), {}, "tensor"),
        (TypeError, (lambda t, y: y[0], (torch.ones(2), torch.ones(2)), [0.0, 1.0]), {}, "tuple"),
    ],
)
def test_bad_input(error, arguments, settings, text):
    with pytest.raises(error, match=text):
        ode.odeint(*arguments, **settings)


# --- modes of PyTorch ----------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["rk4", "dopri5"])
def test_coefficients_made_in_inference_mode_serve_gradients_later(name):
    """The cached coefficients must not be inference tensors."""
    coefficients.cache_clear()
    with torch.inference_mode():
        first = ode.odeint(decay, start(3), [0.0, 0.5, 1.0], method=name)
    y0 = start(3).requires_grad_()
    y = ode.odeint(decay, y0, [0.0, 0.5, 1.0], method=name)
    assert torch.equal(y, first)
    (grad,) = torch.autograd.grad(y[-1].sum(), y0, create_graph=True)
    torch.testing.assert_close(grad, y[-1].detach() / y0.detach())


@pytest.mark.parametrize("adjoint", ["direct", "continuous", "reversible"])
def test_inside_a_compiled_function(adjoint):
    layer = torch.nn.Linear(2, 2).double()

    def loss(y):
        return ode.odeint(lambda t, y: torch.tanh(layer(y)), y, [0.0, 1.0], adjoint=adjoint)[
            -1
        ].sum()

    y0 = start(3, 2)
    expected = torch.autograd.grad(loss(y0), layer.weight)[0]
    compiled = torch.compile(loss, backend="eager")
    found = torch.autograd.grad(compiled(y0), layer.weight)[0]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=0)
