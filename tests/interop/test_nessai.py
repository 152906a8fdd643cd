"""nessai's flows, which consist of glasflow's copy of nflows, where both are installed."""

import copy

import pytest
import torch
from laws.draws import normal

import pyflowkern

utils = pytest.importorskip("nessai.flows.utils")
D = 4
CLOSE = {"rtol": 1e-10, "atol": 1e-10}
CONFIGS = {
    "RealNVP": {"ftype": "realnvp"},
    "MAF": {"ftype": "maf"},
    "NSF": {"ftype": "nsf"},
    "MLP": {"ftype": "realnvp", "net": "mlp", "activation": "silu"},
    "variance": {
        "ftype": "realnvp",
        "distribution": "mvn",
        "distribution_kwargs": {"var": 2.0},
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_flows_are_those_of_the_library(name):
    torch.manual_seed(0)
    sizes = {"n_inputs": D, "n_neurons": 8, "n_blocks": 3, "n_layers": 2}
    model = utils.configure_model({**CONFIGS[name], **sizes}).double()
    x = normal(9, D)
    model.train().log_prob(x)
    twin = copy.deepcopy(model)
    assert not pyflowkern.accelerate(twin).left
    for training in (True, False, True):
        for m in (model.train(training), twin.train(training)):
            m.zero_grad()
        torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)
        want = model.forward_and_log_prob(x)
        torch.testing.assert_close(twin.forward_and_log_prob(x), want, **CLOSE)
    for m in (model, twin):
        torch.manual_seed(1)
        m.apply(utils.reset_weights)
        m.apply(utils.reset_permutations)
    torch.testing.assert_close(twin.log_prob(x), model.log_prob(x), **CLOSE)


def test_latents_are_those_before_a_base_of_its_own_scale():
    from glasflow.flows import RealNVP
    from glasflow.nflows.distributions.normal import DiagonalNormal

    base = DiagonalNormal([D])
    model = RealNVP(D, 2, n_neurons=8, distribution=base).double().eval()
    with torch.no_grad():
        base.mean_.fill_(1.0)
        base.log_std_.fill_(0.5)
    twin, x = copy.deepcopy(model), normal(9, D)
    assert not pyflowkern.accelerate(twin).left
    want = model.forward_and_log_prob(x)
    torch.testing.assert_close(twin.forward_and_log_prob(x), want, **CLOSE)
    torch.testing.assert_close(twin.log_prob(x), want[1], **CLOSE)


def test_classes_of_other_names_are_known():
    """A deprecated class that is the same as its base, and one that has a part of its name twice."""
    from glasflow.flows import autoregressive
    from nessai.flows.transforms import LULinear

    cubic = autoregressive.MaskedPiecewiseCubicAutoregressiveAutoregressiveFlow
    x = normal(5, D).sigmoid()
    for model in (LULinear(D).double(), cubic(D, 2, n_neurons=8, num_bins=4).double()):
        twin = copy.deepcopy(model)
        report = pyflowkern.accelerate(twin)
        assert not report.left
        assert report.entries[0].runs == "one op"
        call = "log_prob" if isinstance(model, cubic) else "forward"
        torch.testing.assert_close(getattr(twin, call)(x), getattr(model, call)(x), **CLOSE)
