"""Kinds of states (entries without axes, complex numbers), tolerances for each element, and named norms."""

import math
import warnings

import pytest
import torch

from pyflowkern import ode

ADJOINTS = ["direct", "continuous", "reversible"]


@pytest.mark.parametrize("adjoint", ADJOINTS)
@pytest.mark.parametrize("settings", [{}, {"method": "rk4", "step_size": 0.01}, {"dense": True}])
def test_entries_without_axes(adjoint, settings):
    """dx/dt = -x for a number beside a vector, forwards and backwards."""
    if adjoint == "reversible" and settings.get("dense"):
        settings = {}
    x0 = torch.tensor(1.0, requires_grad=True)
    x, y = ode.odeint(
        lambda t, s: (-s[0], -s[1]), (x0, torch.ones(2)), [0.0, 1.0], adjoint=adjoint, **settings
    )
    assert x.shape == (2,)
    assert y.shape == (2, 2)
    assert x[-1].item() == pytest.approx(math.exp(-1), rel=1e-5)
    (grad,) = torch.autograd.grad(x[-1], x0)
    assert grad.item() == pytest.approx(math.exp(-1), rel=1e-4)


def test_an_entry_without_axes_in_events_and_dense_output():
    start = (torch.tensor(1.0).double(), torch.zeros(3).double())

    def field(t, s):
        return -s[0], torch.ones_like(s[1])

    t, (x, _) = ode.odeint_event(field, start, 0.0, event_fn=lambda t, s: s[0] - 0.5)
    assert t.item() == pytest.approx(math.log(2), rel=1e-7)
    assert x[-1].item() == pytest.approx(0.5, rel=1e-7)
    dense = ode.solve(field, start, [0.0, 1.0], dense=True).dense
    assert dense(0.5)[0].shape == ()
    assert dense(0.5)[0].item() == pytest.approx(math.exp(-0.5), rel=1e-5)


@pytest.mark.parametrize("control", ["batch", "device", "sample"])
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_complex_states(control, dtype):
    """dz/dt = a z is z0 exp(a t), of the dtype of the state."""
    a = -0.3 + 2.0j
    z0 = torch.tensor([[1.0 + 0.5j, -2.0j], [0.25 + 0j, 3.0 - 1.0j]], dtype=dtype)
    z = ode.odeint(lambda t, z: a * z, z0, [0.0, 0.5, 1.0], control=control, rtol=1e-6, atol=1e-6)
    assert z.dtype == dtype
    exact = z0 * torch.exp(a * torch.tensor([0.0, 0.5, 1.0]).to(dtype))[:, None, None]
    torch.testing.assert_close(z, exact, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_gradients_of_complex_states(adjoint):
    """|z(1)| = |z0| exp(re a): the gradient is exp(re a) |z0| in the real part of ``a``, none in the imaginary one."""
    a = torch.tensor(0.3 + 1.0j, dtype=torch.complex128, requires_grad=True)
    z0 = torch.tensor([1.0 + 0j, 2.0j], dtype=torch.complex128, requires_grad=True)
    z = ode.odeint(lambda t, z: a * z, z0, [0.0, 1.0], adjoint=adjoint)
    grad_a, grad_z = torch.autograd.grad(z[-1].abs().sum(), [a, z0])
    assert abs(grad_a - 3 * math.exp(0.3)).item() < 2e-6
    torch.testing.assert_close(grad_z, math.exp(0.3) * z0.detach() / z0.detach().abs(),
                               rtol=1e-6, atol=1e-6)  # fmt: skip


def test_complex_and_real_entries_and_wrong_results():
    state = (torch.ones(2, dtype=torch.complex64), torch.ones(2))
    z, x = ode.odeint(lambda t, s: (1j * s[0], -s[1]), state, [0.0, math.pi], rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(z[-1], -state[0], rtol=1e-4, atol=1e-4)
    assert x.dtype == torch.float32
    with pytest.raises(TypeError, match="float32"):
        ode.odeint(lambda t, s: (s[0], 1j * s[1]), state, [0.0, 1.0])
    # a real slope of a complex state has no imaginary part
    z = ode.odeint(lambda t, z: z.real, state[0], [0.0, 1.0])
    torch.testing.assert_close(z[-1], math.e * state[0])


def test_events_of_complex_states():
    """exp(i t) meets the imaginary axis at pi / 2, exp(i w t) at pi / (2 w)."""
    w = torch.tensor(2.0, dtype=torch.float64, requires_grad=True)
    t, z = ode.odeint_event(
        lambda t, z: 1j * w * z, torch.ones(1, dtype=torch.complex128), 0.0,
        event_fn=lambda t, z: z.real,
    )  # fmt: skip
    assert t.item() == pytest.approx(math.pi / 4, rel=1e-8)
    assert abs(z[-1].item() - 1j) < 1e-7
    (grad,) = torch.autograd.grad(t, w)
    assert grad.item() == pytest.approx(-math.pi / 8, rel=1e-6)


# --- tolerances ----------------------------------------------------------------------------------


def test_a_tolerance_for_each_element():
    """A fast and a slow component: the tolerance of the fast one determines the steps, and so both errors."""
    speeds = torch.tensor([30.0, 1.0], dtype=torch.float64)

    def solved(atol, rtol=1e-9):
        return ode.solve(lambda t, y: torch.stack([torch.cos(speeds[0] * t), -y[1]]),
                         torch.ones(2).double(), [0.0, 2.0], rtol=rtol, atol=atol)  # fmt: skip

    tight, mixed = solved(1e-9), solved(torch.tensor([1.0, 1e-9]), torch.tensor([1.0, 1e-9]))
    assert mixed.stats.accepted < tight.stats.accepted / 3
    assert mixed.ys[-1, 1].item() == pytest.approx(math.exp(-2), rel=1e-7)
    same = solved(torch.full((2,), 1e-9), torch.full((2,), 1e-9))
    assert same.stats == tight.stats


@pytest.mark.parametrize("adjoint", ADJOINTS)
def test_tolerances_of_tuples_of_tensors(adjoint):
    state = (torch.ones(2, 3).double().requires_grad_(), torch.ones(()).double())
    x, _ = ode.odeint(
        lambda t, s: (-s[0], -s[1]), state, [0.0, 1.0], adjoint=adjoint,
        rtol=(torch.full((3,), 1e-6), 1e-6), atol=(1e-6, torch.tensor(1e-6)),
    )  # fmt: skip
    (grad,) = torch.autograd.grad(x[-1].sum(), state[0])
    torch.testing.assert_close(grad, torch.full((2, 3), math.exp(-1)).double(), rtol=1e-4, atol=0)


def test_tolerances_that_do_not_fit():
    def solved(**settings):
        return ode.solve(lambda t, y: -y, torch.ones(2, 3), [0.0, 1.0], **settings)

    with pytest.raises(ValueError, match="rtol must broadcast"):
        solved(rtol=torch.ones(2))
    with pytest.raises(ValueError, match="at least 0"):
        solved(atol=torch.tensor([1.0, -1.0, 1.0]))
    with pytest.raises(ValueError, match="both be 0"):
        solved(rtol=torch.tensor([1.0, 0.0, 1.0]), atol=torch.tensor([0.0, 0.0, 1.0]))


# --- norms ---------------------------------------------------------------------------------------


def one_fast_sample(t, y):
    """Sample 0 rotates at 40 radians per unit of time, the others stand still."""
    speed = torch.zeros(len(y), 1, dtype=y.dtype)
    speed[0] = 40.0
    return speed * torch.stack([-y[:, 1], y[:, 0]], 1)


@pytest.mark.parametrize("control", ["batch", "device"])
@pytest.mark.parametrize("norm", ["max_sample", "max"])
def test_one_fast_sample_of_many_is_as_accurate_as_alone(norm, control):
    """With the mean over a batch its error may be larger by the root of the number of samples; with a maximum not."""
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(1000, 1)

    def error(rows, **settings):
        y = ode.odeint(one_fast_sample, y0[:rows], [0.0, 1.0], rtol=1e-5, atol=1e-5,
                       control=control, **settings)  # fmt: skip
        exact = torch.tensor([math.cos(40.0), math.sin(40.0)]).double()
        return (y[-1, 0] - exact).abs().max().item()

    alone = error(1, norm=norm)
    assert error(1000, norm=norm) == pytest.approx(alone, rel=1e-6)
    assert error(1000) > 3 * alone  # the mean hides it
    same = [ode.solve(one_fast_sample, y0[:n], [0.0, 1.0], norm=norm, control=control).stats
            for n in (1, 300)]  # fmt: skip
    assert same[0] == same[1]


def test_norms_of_tuples_and_of_samples_with_their_own_steps():
    state = (torch.ones(4, 3).double(), torch.ones(4).double())

    def field(t, s):
        return -s[0], torch.cos(9 * t) * torch.ones_like(s[1])

    found = {
        norm: ode.solve(field, state, [0.0, 2.0], norm=norm).stats.accepted
        for norm in ("rms", "max_sample", "max")
    }
    assert found["rms"] == found["max_sample"] <= found["max"]  # since all samples are alike
    for norm in ("rms", "max_sample", "max"):
        x, _ = ode.odeint(
            lambda t, s: (-s[0], -s[1]), state, [0.0, 2.0], norm=norm, control="sample"
        )
        torch.testing.assert_close(x[-1], math.exp(-2) * state[0], rtol=1e-6, atol=0)


@pytest.mark.parametrize("norm", ["max_sample", "max"])
def test_the_backward_solve_has_the_norm_of_the_forward_solve(norm):
    y0 = torch.tensor([1.0, 0.0], dtype=torch.float64).repeat(200, 1).requires_grad_()
    counts = []

    def field(t, y):
        counts.append(1)
        return one_fast_sample(t, y)

    def backward_calls(**settings):
        y = ode.odeint(field, y0, [0.0, 1.0], rtol=1e-5, atol=1e-5, adjoint="continuous",
                       params=(), **settings)  # fmt: skip
        counts.clear()
        (grad,) = torch.autograd.grad(y[-1].square().sum(), y0)
        torch.testing.assert_close(grad, 2 * y0.detach(), rtol=1e-2, atol=1e-2)
        return len(counts)

    assert backward_calls(norm=norm) > 1.3 * backward_calls()


def test_norms_that_do_not_fit():
    with pytest.raises(ValueError, match="norm must be one of"):
        ode.solve(lambda t, y: -y, torch.ones(2), [0.0, 1.0], norm="l2")
    with pytest.raises(ValueError, match="batch axis"):
        ode.solve(lambda t, y: (-y[0], -y[1]), (torch.ones(2), torch.ones(())), [0.0, 1.0],
                  norm="max_sample")  # fmt: skip


# --- the state between the steps -----------------------------------------------------------------


@pytest.mark.parametrize("adjoint", ["direct", "continuous"])
@pytest.mark.parametrize(
    "settings",
    [{}, {"compat": "torchdiffeq"}, {"method": "rk4", "step_size": 0.05}, {"jump_t": [0.3, 0.6]},
     {"checkpoint": False}, {"control": "device"}],
    ids=str,
)  # fmt: skip
def test_gradients_of_dense_output(adjoint, settings):
    """y(t) = y0 exp(-a t), at times in the first and in a later step: its gradients in ``a``, ``y0`` and ``t``."""
    a = torch.tensor(1.5, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(2, dtype=torch.float64, requires_grad=True)
    if adjoint == "continuous":
        settings = {k: v for k, v in settings.items() if k != "checkpoint"}
    s = ode.solve(lambda t, y: -a * y, y0, [0.0, 1.0], dense=True, adjoint=adjoint,
                  max_step=0.2, **settings)  # fmt: skip
    for at in (0.0, 0.01, 0.37, 0.71, 1.0):
        t = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        y = s.dense(t)
        torch.testing.assert_close(y, s.dense(at))
        assert y[0].item() == pytest.approx(math.exp(-1.5 * at), rel=1e-5)
        by_a, by_y, by_t = torch.autograd.grad(y.sum(), [a, y0, t], retain_graph=True)
        value = math.exp(-1.5 * at)
        assert by_a.item() == pytest.approx(-2 * at * value, rel=1e-4, abs=1e-9)
        torch.testing.assert_close(by_y, torch.full_like(by_y, value), rtol=1e-4, atol=0)
        assert by_t.item() == pytest.approx(-3 * value, rel=1e-4)
    with torch.no_grad():
        assert not s.dense(0.5).requires_grad


@pytest.mark.parametrize("recorded", [True, False])
def test_dense_output_has_its_slope_where_nothing_else_requires_a_gradient(recorded):
    """y = e^-2t, also in a stretch after a jump; a time that requires a gradient is no reason for a warning."""
    rate = torch.tensor(2.0, dtype=torch.float64, requires_grad=not recorded)
    y0 = torch.ones(2, dtype=torch.float64)
    with torch.set_grad_enabled(recorded):
        s = ode.solve(lambda t, y: -rate * y, y0, [0.0, 1.0], dense=True, jump_t=[0.5])
    for at in (0.2, 0.7):
        t = torch.tensor(at, dtype=torch.float64, requires_grad=True)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            (slope,) = torch.autograd.grad(s.dense(t).sum(), t)
        assert slope.item() == pytest.approx(-4 * math.exp(-2 * at), rel=1e-6)


def test_times_in_a_list_get_their_gradients():
    """dy/dt(1) = -e^-1, of an output, of the end of a dense output, and of the start of a search for an event."""
    one = torch.tensor(1.0, dtype=torch.float64, requires_grad=True)
    y0 = torch.ones(1, dtype=torch.float64)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = ode.odeint(lambda t, y: -y, y0, [0.0, one])[-1]
        dense = ode.odeint_dense(lambda t, y: -y, y0, 0.0, one)(one)
        t, _ = ode.odeint(lambda t, y: -y, y0, [one, 5.0], event_fn=lambda t, y: y - 0.5)
        found = [torch.autograd.grad(v.sum(), one)[0].item() for v in (y, dense, t)]
    assert found == pytest.approx([-math.exp(-1), -math.exp(-1), 1.0], rel=1e-6)
