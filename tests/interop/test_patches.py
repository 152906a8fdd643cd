"""accelerate() without a model: functions of libraries under every name, for this process, until all is undone."""

import pickle
import sys
import threading
from types import ModuleType

import nflows.transforms.autoregressive as nflows_autoregressive
import nflows.transforms.splines as nflows_splines
import normflows.flows.neural_spline.coupling as normflows_coupling
import pytest
import torch
import torchdiffeq
from nflows.transforms import PiecewiseRationalQuadraticCDF
from nflows.transforms.base import InputOutsideDomain

import pyflowkern
from pyflowkern.interop import _patches, nflows


@pytest.fixture
def client():
    """A module that imported functions by name, and one by another name."""
    module = ModuleType("client_of_functions")
    module.solve = torchdiffeq.odeint
    module.unconstrained_linear_spline = nflows_splines.unconstrained_linear_spline
    sys.modules[module.__name__] = module
    yield module
    del sys.modules[module.__name__]


def holders(client):
    """Where functions are held, and under which names."""
    for kind in ("linear", "quadratic", "cubic", "rational_quadratic"):
        for name in (f"{kind}_spline", f"unconstrained_{kind}_spline"):
            yield nflows_splines, name
            yield sys.modules[f"nflows.transforms.splines.{kind}"], name
    yield nflows_autoregressive, "unconstrained_rational_quadratic_spline"
    yield nflows_autoregressive, "cubic_spline"
    yield normflows_coupling.splines, "unconstrained_rational_quadratic_spline"
    yield torchdiffeq, "odeint"
    yield torchdiffeq, "odeint_adjoint"
    yield torchdiffeq, "odeint_event"
    yield client, "solve"
    yield client, "unconstrained_linear_spline"


def held(client):
    return [getattr(module, name) for module, name in holders(client)]


def called(monkeypatch):
    """Record the calls of our op."""
    calls = []
    module = sys.modules[
        "pyflowkern.ops.spline"
    ]  # as an attribute it is the function of that name
    own = module._spline

    def op(*args):
        calls.append(1)
        return own(*args)

    monkeypatch.setattr(module, "_spline", op)
    return calls


def test_every_name_is_replaced_and_given_back(client):
    before = held(client)
    with pyflowkern.accelerate() as report:
        during = held(client)
        assert not any(a is b for a, b in zip(before, during, strict=True))
        assert during[-2] is torchdiffeq.odeint
        kinds = [entry.kind for entry in report.accelerated if entry.note == "functions"]
        assert "torchdiffeq" in kinds
        assert "normflows.utils.splines" in kinds
        assert pickle.loads(pickle.dumps(torchdiffeq.odeint)) is torchdiffeq.odeint
        later = ModuleType("imported_later")
        later.odeint = torchdiffeq.odeint
        sys.modules[later.__name__] = later
    del sys.modules[later.__name__]
    assert all(a is b for a, b in zip(before, held(client), strict=True))
    assert later.odeint is torchdiffeq.odeint


def test_blocks_within_blocks_and_restore(client):
    before = held(client)
    with pyflowkern.accelerate():
        with pyflowkern.accelerate():
            assert held(client)[0] is not before[0]
        during = held(client)
        assert during[0] is not before[0]
        again = pyflowkern.accelerate()
    assert held(client) == during  # the last call still wants it
    with again:
        pass
    assert held(client) == before
    pyflowkern.accelerate()
    left = pyflowkern.accelerate()
    pyflowkern.restore()
    assert held(client) == before
    with pyflowkern.accelerate():
        with left:  # undone already
            pass
        assert held(client)[0] is not before[0]
    assert held(client) == before


def test_values_and_the_op(client, monkeypatch):
    torch.manual_seed(0)
    x, raw = torch.randn(6, 2).double(), torch.randn(6, 2, 5).double()
    cdf = PiecewiseRationalQuadraticCDF([2], tails="linear").double()
    t = torch.tensor([0.0, 1.0])

    def run():
        return [
            *client.unconstrained_linear_spline(x, raw),
            *cdf(x),
            client.solve(lambda t, y: -y, x, t),
        ]

    want = run()
    calls = called(monkeypatch)
    with pyflowkern.accelerate():
        got = run()
        assert len(calls) >= 1
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)
    calls.clear()
    run()
    assert not calls


def test_solves_with_fixed_steps_are_ours(monkeypatch):
    module, solves = sys.modules["pyflowkern.interop.torchdiffeq"], []
    own = module.ode.solve
    monkeypatch.setattr(module.ode, "solve", lambda *a, **k: solves.append(1) or own(*a, **k))
    with pyflowkern.accelerate():
        for method in ("euler", "midpoint", "rk4"):
            torchdiffeq.odeint(
                lambda t, y: -y, torch.ones(2), torch.linspace(0, 1, 3), method=method
            )
    assert len(solves) == 3


def test_what_ours_refuses_and_compilers_run_the_library(monkeypatch):
    one_bin, x = torch.zeros(3, 1), torch.rand(3)
    calls = called(monkeypatch)
    with pyflowkern.accelerate():
        y, _ = nflows_splines.linear_spline(x, one_bin)  # of at least 2 bins are ours
        torch.testing.assert_close(y, x)
        y, log_det = nflows_splines.linear_spline(x, torch.zeros(3, 2), top=2.0)
        assert log_det.abs().max() == 0  # nflows' own defect stays what it is
        with pytest.raises(InputOutsideDomain):
            nflows_splines.linear_spline(x + 1, one_bin)
        with pytest.raises(RuntimeError, match="tails are not implemented"):
            nflows_splines.unconstrained_linear_spline(x, one_bin, tails="none")
        with pytest.raises(ValueError, match="Invalid method"):
            torchdiffeq.odeint(lambda t, y: y, x, torch.tensor([0.0, 1.0]), method="none")
        assert not calls

        compiled = torch.compile(
            lambda x, raw: nflows_splines.linear.linear_spline(x, raw)[0] + 1, backend="eager"
        )
        torch.testing.assert_close(compiled(x, torch.zeros(3, 2)), x + 1)
        assert not calls
        nflows_splines.linear_spline(x, torch.zeros(3, 2))
        assert calls


def test_threads(client):
    """Many threads begin and end blocks; each finds it on within its own, and it is off after the last."""
    before, wrong = held(client), []

    def work():
        for _ in range(3):
            with pyflowkern.accelerate():
                if not hasattr(torchdiffeq.odeint, "_pyflowkern_original"):
                    wrong.append(1)

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong
    assert held(client) == before


def test_copies_of_nflows_in_other_packages_are_known():
    known = {patch.module for patch in _patches.PATCHES}
    assert "glasflow.nflows.transforms.splines.rational_quadratic" in known
    for patch in _patches.PATCHES:
        ours = __import__(patch.ours, fromlist=["x"])
        assert all(callable(getattr(ours, name)) for name in patch.names)
    assert nflows.cubic_spline.__name__ == "cubic_spline"
