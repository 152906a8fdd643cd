"""Errors on the way back of ``memory="reversible"``: what is found, kept and said of them."""

import warnings
from functools import partial

import pytest
import torch
from laws.reversible import IMAGES, couplings, results, same, twin
from torch.utils.checkpoint import checkpoint

from pyflowkern import nn
from pyflowkern.nn import _drift


def test_an_ill_conditioned_layer_keeps_its_input():
    bad = nn.AffineCoupling(4, partial(nn.ConvNet, hidden=4), scale_map="exp")
    stored = nn.Sequential(*couplings(2), bad, *couplings(2)).float()
    with torch.no_grad():
        bad.conditioner.last.bias.copy_(torch.tensor([1.0, 1.0, -20.0, -20.0]))
    other, x = twin(stored), IMAGES.float()
    with pytest.warns(
        UserWarning, match=r"layers\[2\] \(AffineCoupling\), which has a relative error of"
    ):
        found = results(other, other, x)
    same(found, results(stored, stored, x), 1e-5)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        same(results(other, other, x), results(stored, stored, x), 1e-5)


def test_errors_that_add_up_are_found(monkeypatch):
    """From layer to layer they stay below the bound, from the end on they do not: an input between is kept."""
    stored = couplings(12, "stored").float()
    other, x = twin(stored), IMAGES.float()
    monkeypatch.setitem(_drift.LARGEST, torch.float32, 2.5e-7)
    with pytest.warns(UserWarning, match="from the end"):
        results(other, other, x)
    for _ in range(12):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            same(results(other, other, x), results(stored, stored, x), 1e-4)
    kept = other._guards[0].kept
    assert 0 < len(kept) < 12


def test_samples_that_do_not_come_back_spoil_no_others():
    """A scale that becomes 0 for one sample after the first look: the way back is 0 / 0 there."""
    stored = couplings(2).float()
    crush = _Crush()
    whole = nn.Sequential(stored[0], crush, stored[1], memory="reversible")
    x = IMAGES.float()
    results(whole, whole, x)
    crush.sample = 1
    with pytest.warns(UserWarning, match=r"layers\[1\] \(_Crush\), which of 1 samples"):
        grads = results(whole, whole, x)[2:-1]
    assert all(g.isfinite().all() for g in grads)
    whole.memory = "stored"
    others = torch.arange(5) != 1
    torch.testing.assert_close(grads[0][others], results(whole, whole, x)[2][others])


class _Crush(nn.Bijection):
    """A scale of 1, or of 0 for one sample."""

    sample = None

    def _scale(self, x):
        scale = torch.ones_like(x)
        if self.sample is not None:
            scale[self.sample] = 0
        return scale

    def forward(self, x, context=None):
        return x * self._scale(x), x.new_zeros(len(x))

    def inverse(self, z, context=None):
        return z / self._scale(z), z.new_zeros(len(z))


def test_a_sample_without_gradient_spoils_nothing():
    """It is infinite at the end, and not asked for."""
    flow = couplings()
    x = IMAGES.clone()
    x[2] = torch.inf
    z, log_det = flow(x)
    fine = torch.arange(5) != 2
    (z[fine].sum() + log_det[fine].sum()).backward()
    found = [p.grad.clone() for p in flow.parameters()]
    flow.zero_grad()
    z, log_det = flow(IMAGES[fine])
    (z.sum() + log_det.sum()).backward()
    torch.testing.assert_close(found, [p.grad for p in flow.parameters()])


@pytest.mark.parametrize("place", [1, 2])
def test_what_is_found_between_the_two_runs_of_a_checkpoint_changes_neither(place):
    """Of two parts one is differentiated, and what does not come back is found, before the other runs again."""
    layers, crush = [*couplings(2).float()], _Crush()
    layers.insert(place, crush)
    whole = nn.Sequential(*layers, memory="reversible")
    x = IMAGES.float()
    results(whole, whole, x)
    crush.sample = 1

    def call(x):
        pairs = [checkpoint(whole, part, use_reentrant=False) for part in (x, 2 * x)]
        return tuple(map(torch.cat, zip(*pairs, strict=True)))

    found = results(call, whole, x)
    whole.memory = "stored"
    same(found, results(call, whole, x), 1e-6)


def test_a_bad_tensor_is_found_in_a_checkpoint_too():
    flow, scale = couplings(), torch.ones((), dtype=torch.float64, requires_grad=True)
    network = flow[1].conditioner
    forward = network.forward
    network.forward = lambda h, context=None: forward(h, context) * scale
    z, _ = checkpoint(flow, IMAGES, use_reentrant=False)
    with pytest.raises(RuntimeError, match="is no parameter of it"):
        z.sum().backward()
