"""Glow as a script: its flows and blocks run by a few ops, to the same results."""

import copy
import pickle

import pytest
import torch
from laws import glow_script
from laws.draws import normal

import pyflowkern
from pyflowkern.nn.links import Door

CLOSE = {"rtol": 1e-10, "atol": 1e-10}
MODELS = {
    "factors": lambda: glow_script.Glow(3, 2, 2),
    "dense": lambda: glow_script.Glow(3, 2, 2, conv_lu=False),
    "additive": lambda: glow_script.Glow(2, 1, 2, affine=False),
    "one level": lambda: glow_script.Glow(1, 2, 1),
}


def images(model):
    return normal(3, model.blocks[0].flows[0].actnorm.loc.shape[1] // 4, 8, 12)


def pair(name, started=True):
    """Return a model as it is, and an accelerated copy."""
    torch.manual_seed(0)
    model = MODELS[name]().double()
    if started:
        with torch.no_grad():
            model(images(model))
            for p in model.parameters():
                p.add_(torch.randn_like(p), alpha=0.05)
            for block in model.blocks:  # scales may be negative
                block.flows[0].actnorm.scale[:, :2].neg_()
    twin = copy.deepcopy(model)
    report = pyflowkern.accelerate(twin)
    assert len(report.accelerated) == sum(1 + len(b.flows) for b in model.blocks)
    assert not report.left
    torch.testing.assert_close(twin.state_dict(), model.state_dict(), rtol=0, atol=0)
    return model, twin


def derivatives(model, x):
    x = x.detach().clone().requires_grad_()
    log_p, log_det, latents = model(x)
    weights = torch.arange(1, 1 + len(x))
    loss = (log_p * weights).sum() + (log_det * weights).sum() + sum((z**2).sum() for z in latents)
    grads = torch.autograd.grad(loss, [x, *model.parameters()], allow_unused=True)
    return [log_p, log_det, *latents, *grads]


@pytest.fixture(params=MODELS)
def name(request):
    return request.param


def test_densities_and_gradients_are_those_of_the_script(name):
    model, twin = pair(name)
    x = images(model)
    torch.testing.assert_close(derivatives(twin, x), derivatives(model, x), **CLOSE)


@pytest.mark.parametrize("reconstruct", [False, True])
def test_images_are_those_of_the_script(name, reconstruct):
    model, twin = pair(name)
    latents = [normal(*z.shape, seed=3) for z in model(images(model))[2]]
    want = model.reverse(latents, reconstruct)
    torch.testing.assert_close(twin.reverse(latents, reconstruct), want, **CLOSE)


def test_the_first_batch_starts_it(name):
    model, twin = pair(name, started=False)
    x = images(model)
    for _ in range(2):
        torch.testing.assert_close(derivatives(twin, x), derivatives(model, x), **CLOSE)
    for p, q in zip(model.state_dict().values(), twin.state_dict().values(), strict=True):
        torch.testing.assert_close(p, q)


@pytest.mark.parametrize("how", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))])
def test_copies_share_nothing(how):
    model, twin = pair("factors")
    x = images(model)
    twin(x)
    other = how(twin)
    with torch.no_grad():
        for p in other.parameters():
            p.mul_(0.5)
    torch.testing.assert_close(twin(x), model(x), **CLOSE)


def test_values_written_in_place_count():
    model, twin = pair("factors")
    x = images(model)
    twin(x)
    for m in (model, twin):
        for p in m.parameters():
            p.data.fill_(0.1)
    torch.testing.assert_close(twin(x), model(x), **CLOSE)


def test_hooks_and_methods_of_instances_are_called():
    _, twin = pair("factors")
    x, seen = images(twin), []
    part = twin.blocks[0].flows[0].coupling.net[2]
    part.register_forward_hook(lambda *_: seen.append(1))
    twin(x)
    assert seen == [1]
    mixing = twin.blocks[0].flows[1].invconv
    mixing.reverse = lambda z: seen.append(2) or type(mixing).reverse(mixing, z)
    twin.reverse(twin(x)[2])
    assert 2 in seen


def test_modes_in_which_the_script_runs_itself():
    model, twin = pair("factors")
    x = images(model)
    with torch.inference_mode():
        torch.testing.assert_close(twin(x), model(x), **CLOSE)
    twin(x)  # what was kept in inference mode is no inference tensor
    model, twin = model.float(), twin.float()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(twin(x.float()), model(x.float()))


def test_restore_gives_the_methods_back():
    _, twin = pair("factors")
    pyflowkern.restore(twin)
    assert not any(isinstance(v, Door) for m in twin.modules() for v in m.__dict__.values())


def test_a_script_with_another_formula_is_left_alone():
    class AffineCoupling(glow_script.AffineCoupling):
        def forward(self, input):
            out, log_det = super().forward(input)
            return 2 * out, log_det

    flow = glow_script.Flow(4).double()
    flow.coupling = AffineCoupling(4).double()
    flow(normal(2, 4, 6, 6))
    report = pyflowkern.accelerate(flow)
    assert not report.accelerated
    assert report.left[0].note == "its values are not those of the form that its name says"


def test_flows_of_other_parts_are_no_news():
    class Flow(torch.nn.Module):
        def __init__(self, in_channel):
            super().__init__()
            self.linear = torch.nn.Linear(in_channel, in_channel)

        def forward(self, x):
            return self.linear(x)

        def reverse(self, x):
            return x

    assert not pyflowkern.accelerate(Flow(3)).entries
