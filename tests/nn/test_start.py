"""ActNorm's initialisation: once, from the first data in either direction, never after training."""

import copy
import io
import pickle

import pytest
import torch
from laws import normal
from torch.utils.checkpoint import checkpoint

from pyflowkern import flows, nn

FLOWS = {
    "RealNVP": lambda: flows.RealNVP(2, steps=2, hidden=8),
    "Glow": lambda: flows.Glow(2, steps=2, hidden=8),
    "Glow on images": lambda: flows.Glow((1, 4, 4), levels=1, steps=2, hidden=4),
}
every_flow = pytest.mark.parametrize("name", FLOWS)


def data(flow, n=16, seed=0):
    return normal(n, *flow.event_shape, seed=seed).float() * 3 + 2


def parts(flow):
    return [m for m in flow.modules() if isinstance(m, nn.ActNorm)]


@every_flow
def test_training_through_the_inverse_is_not_undone(name):
    flow = FLOWS[name]()
    optimizer = torch.optim.Adam(flow.parameters(), lr=0.01)
    for _ in range(20):
        x, log_q = flow.sample_and_log_prob(16)
        loss = (log_q + ((x - 3) ** 2 / 8).flatten(1).sum(1)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    x, log_q = flow.sample_and_log_prob(16)
    # rounding of the log-determinants of a few layers, in both directions
    torch.testing.assert_close(flow.log_prob(x.detach()), log_q, atol=1e-4, rtol=1e-4)
    assert all(m.initialized for m in parts(flow))


@pytest.mark.parametrize("make", [nn.ActNorm, nn.GlowStep])
@pytest.mark.parametrize("shape", [(64, 3), (8, 3, 4, 4)], ids=str)
def test_first_data_through_the_inverse_get_mean_0_and_variance_1(make, shape):
    layer = make(3)
    x = layer.inverse(normal(*shape).float() * 3 + 5)[0].detach().double()
    axes = [d for d in range(x.dim()) if d != 1]
    torch.testing.assert_close(x.mean(axes), torch.zeros(3).double(), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        x.var(axes, correction=0), torch.ones(3).double(), atol=1e-3, rtol=0
    )


@every_flow
@pytest.mark.parametrize("first", ["fresh", "loaded", "loaded untrained", "eval mode"])
@pytest.mark.parametrize("direction", ["log_prob", "sample_and_log_prob"])
def test_two_passes_in_one_loss(name, first, direction):
    flow = FLOWS[name]()
    if first == "loaded":
        other = FLOWS[name]()
        other.log_prob(data(other))
        flow.load_state_dict(other.state_dict())
    if first == "loaded untrained":
        flow.load_state_dict(copy.deepcopy(flow.state_dict()))

    def one(seed):
        if direction == "log_prob":
            return flow.log_prob(data(flow, seed=seed)).mean()
        return flow.sample_and_log_prob(16)[1].mean()

    for _ in range(3):
        if first == "eval mode":
            flow.eval()
        loss = one(0)
        flow.train()
        (loss + one(1)).backward()
    bad = torch.full_like(data(flow), torch.nan)
    flow = FLOWS[name]()
    (flow.log_prob(bad).mean() + flow.log_prob(data(flow)).mean()).backward()
    assert all(m.initialized for m in parts(flow))


def test_gradients_recorded_before_initialisation_use_the_values_of_then():
    layer, x = nn.ActNorm(3), normal(8, 3).float() * 4
    before = layer.eval()(x)[0].square().sum()
    layer.train()(x)
    before.backward()
    torch.testing.assert_close(layer.log_scale.grad, 2 * x.square().sum(0))


def averaged_by_data(model, average):
    for p, q in zip(average.parameters(), model.parameters(), strict=True):
        p.data.lerp_(q.data, 1.0)


AVERAGES = {
    "by data": (copy.deepcopy, averaged_by_data),
    "AveragedModel": (
        lambda model: torch.optim.swa_utils.AveragedModel(model),
        lambda model, average: average.update_parameters(model),
    ),
    "AveragedModel with buffers": (
        lambda model: torch.optim.swa_utils.AveragedModel(model, use_buffers=True),
        lambda model, average: average.update_parameters(model),
    ),
}


@every_flow
@pytest.mark.parametrize("kind", AVERAGES)
def test_a_copy_made_before_the_first_batch_keeps_averaged_parameters(kind, name):
    make, update = AVERAGES[kind]
    flow = FLOWS[name]()
    average = make(flow)
    x = data(flow)
    flow.log_prob(x)
    with torch.no_grad():
        for m in parts(flow):
            m.bias += 0.5
    update(flow, average)
    other = getattr(average, "module", average).train()
    # in training mode, as copies of a model in training often are
    other.log_prob(data(flow, seed=3) * 7)
    torch.testing.assert_close(other.log_prob(x), flow.log_prob(x))
    fresh = FLOWS[name]()
    copied = copy.deepcopy(fresh)
    copied.load_state_dict(fresh.state_dict())
    for each in (fresh, copied):
        each.log_prob(x)
    torch.testing.assert_close(fresh.log_prob(x), copied.log_prob(x))


def test_parameters_that_were_set_are_not_overwritten():
    layer = nn.ActNorm(3)
    torch.nn.init.constant_(layer.bias, 2.0)
    layer(normal(8, 3).float())
    assert layer.bias.eq(2).all()
    assert layer.log_scale.eq(0).all()
    assert layer.initialized


def test_after_meta_and_reset_the_layer_waits_for_data():
    with torch.device("meta"):
        layer = nn.ActNorm(3)
    layer(torch.ones(2, 3, device="meta"))
    layer = layer.to_empty(device="cpu")
    layer.reset_parameters()
    x = normal(32, 3).float() * 4 + 1
    z, _ = layer(x)
    expected = nn.ActNorm(3)
    assert torch.equal(z, expected(x)[0])
    resumed = pickle.loads(pickle.dumps(layer))
    resumed(x * 9)
    assert torch.equal(resumed.bias, layer.bias)


@pytest.mark.parametrize("dtype", [torch.bool, torch.float32])
def test_state_of_earlier_versions_is_loaded(dtype):
    """In earlier versions the flag was a bool."""
    trained = nn.ActNorm(3)
    trained(normal(8, 3).float())
    state = trained.state_dict()
    state["initialized"] = state["initialized"].to(dtype)
    for assign in (False, True):
        layer = nn.ActNorm(3)
        layer.load_state_dict(state, assign=assign)
        layer(normal(8, 3, seed=2).float() * 5)
        assert torch.equal(layer.bias, trained.bias)


def test_a_functional_call_initialises_the_given_parameters():
    layer, x = nn.ActNorm(3), normal(8, 3).float() + 4
    state = {k: v.detach().clone() for k, v in layer.state_dict().items()}
    z, _ = torch.func.functional_call(layer, state, (x,))
    assert torch.equal(z, nn.ActNorm(3)(x)[0])
    assert not layer.initialized
    assert torch.equal(layer(x)[0], z)  # the layer itself was not initialised before


@every_flow
@pytest.mark.parametrize("reentrant", [False, True])
def test_the_first_step_may_be_computed_again(name, reentrant):
    """torch's checkpointing wants the same ops in the backward pass, and the layers have started since."""
    flow = FLOWS[name]()
    alone, x = copy.deepcopy(flow), data(flow).requires_grad_()
    for _ in range(2):
        for each in (flow, alone):
            each.zero_grad()
        checkpoint(flow.log_prob, x, use_reentrant=reentrant).sum().backward()
        alone.log_prob(x).sum().backward()
        for p, q in zip(alone.parameters(), flow.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-5, rtol=1e-5)


@pytest.mark.slow
@every_flow
def test_exported_programs_are_saved_and_loaded(name):
    flow = FLOWS[name]().eval()
    x = data(flow, 4)
    program = torch.export.export(flow, (x,))
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    torch.testing.assert_close(torch.export.load(file).module()(x), flow(x))
