"""In eval mode a continuous flow is deterministic: exact traces, or a fixed probe in many dimensions."""

import pytest
import torch
from laws import normal, randomize

from pyflowkern import flows

FIXED = {"method": "rk4", "step_size": 0.25}
BUILDS = {
    "CNF": lambda **o: flows.CNF(3, (8, 8), **FIXED, **o),
    "FFJORD": lambda **o: flows.FFJORD(3, (8, 8), blocks=2, **FIXED, **o),
    "gaussian": lambda **o: flows.FFJORD(3, (8,), noise="gaussian", probes=2, **FIXED, **o),
    "image": lambda **o: flows.FFJORD((1, 4, 4), (4,), levels=2, **FIXED, **o),
    "many dimensions": lambda **o: flows.FFJORD(80, (8,), **FIXED, **o),
    "many dimensions, gaussian": lambda **o: flows.CNF(80, (8,), noise="gaussian", **FIXED, **o),
}


def make(name, **options):
    torch.manual_seed(0)
    flow = randomize(BUILDS[name](**options), 1.0)
    return flow, normal(5, *flow.event_shape, dtype=torch.float32)


@pytest.mark.parametrize("name", BUILDS)
def test_two_calls_return_the_same(name):
    flow, x = make(name)
    in_training = [flow.log_prob(x) for _ in range(2)]
    assert not torch.equal(*in_training)  # a new probe for every step
    flow.eval()
    state = torch.get_rng_state()
    calls = [flow.log_prob(x) for _ in range(2)]
    assert torch.equal(*calls)
    assert torch.equal(flow.terms(x).log_prob, flow.terms(x).log_prob)
    z = flow(x)[0]
    assert torch.equal(flow.inverse(z)[1], flow.inverse(z)[1])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", ["CNF", "FFJORD", "gaussian", "image"])
def test_few_dimensions_have_an_exact_trace(name):
    flow, x = make(name)
    exact, _ = make(name, divergence="exact")
    flow.eval()
    torch.testing.assert_close(flow.log_prob(x), exact.log_prob(x), rtol=1e-5, atol=1e-5)
    terms = flow.terms(x)
    torch.testing.assert_close(terms.log_prob, flow.log_prob(x), rtol=1e-4, atol=1e-4)
    assert terms.standard_error.eq(0).all()


@pytest.mark.parametrize("name", ["CNF", "many dimensions", "many dimensions, gaussian"])
def test_the_switch_decides(name):
    found = {}
    for how in ("exact", "fixed", "hutchinson", "auto"):
        flow, x = make(name, eval_divergence=how)
        flow.eval()
        found[how] = flow.log_prob(x).detach()
        assert torch.equal(flow.log_prob(x), found[how]) is (how != "hutchinson")
    assert torch.equal(found["auto"], found["exact" if name == "CNF" else "fixed"])
    assert not torch.equal(found["exact"], found["fixed"])
    # the fixed probe gives an estimate like any other
    errors = found["fixed"] - found["exact"], found["hutchinson"] - found["exact"]
    assert errors[0].abs().mean() < 5 * errors[1].abs().mean() + 1e-6


def test_probes_that_are_asked_for_are_drawn_in_eval_mode_too():
    flow, x = make("CNF")
    flow.eval()
    terms = flow.terms(x, probes=64, generator=torch.Generator().manual_seed(0))
    assert terms.standard_error.gt(0).all()
    deviations = (terms.log_prob - flow.log_prob(x)) / terms.standard_error
    assert deviations.square().mean() < 5
    pair = [flow.terms(x, generator=torch.Generator().manual_seed(1)).log_prob for _ in range(2)]
    assert torch.equal(*pair)
    assert not torch.equal(flow.terms(x, probes=1).log_prob, flow.terms(x, probes=1).log_prob)


def test_several_probes_are_averaged_in_both_directions():
    """In training mode; of probes of the same seed, and in float64, where there and back differ by the solver alone."""
    flow = flows.CNF(3, (8,), probes=4, method="rk4", step_size=0.05).double().train()
    x = normal(5, 3)
    exact = flow.eval().log_prob(x)
    flow.train()
    results = []
    for call in (flow.log_prob, lambda x: flow.terms(x).log_prob):
        torch.manual_seed(1)
        results.append(call(x))
    assert torch.equal(*results)
    assert not torch.equal(results[0], exact)  # four estimates
    torch.manual_seed(1)
    z, log_det = flow(x)
    torch.manual_seed(1)
    _, back = flow.inverse(z)
    torch.testing.assert_close(back, -log_det, rtol=0, atol=1e-6)


def test_an_exact_flow_is_exact_whatever_is_asked_for():
    flow, x = make("CNF", divergence="exact", eval_divergence="hutchinson")
    for training in (True, False):
        flow.train(training)
        assert torch.equal(flow.log_prob(x), flow.log_prob(x))
        assert flow.terms(x, probes=3).standard_error.eq(0).all()


def test_an_unknown_switch_is_named():
    with pytest.raises(
        ValueError,
        match="eval_divergence must be 'auto', 'exact', 'fixed' or 'hutchinson', got 'no'",
    ):
        flows.CNF(2, eval_divergence="no")
