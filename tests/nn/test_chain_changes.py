"""Runs of layers as one op: nothing is stale, and the layers are called wherever anything hangs on them."""

from functools import partial

import pytest
import torch
from laws import randomize
from laws.chains import Affine, D, agrees, by_layers, calls, make, mlp, residual, trained
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.nn import functional
from torch.nn.utils import parametrizations

from pyflowkern import _library, flows, nn, use_reference
from pyflowkern.nn import chain
from pyflowkern.ops import ScaleMap

__all__ = ["calls"]  # a fixture


@pytest.fixture(autouse=True)
def _kernels():
    _library.require_kernels("cpu")


# --- nothing is stale ----------------------------------------------------------------------------


def doubled(flow):
    """Return its state with other numbers."""
    return {k: v if "permutation" in k else 2 * v for k, v in flow.state_dict().items()}


CHANGES = {
    "values": lambda f: f[0].conditioner.first.weight.data.mul_(2),
    "a parameter": lambda f: setattr(f[0].conditioner.last, "bias", torch.nn.Parameter(torch.ones(4).double())),
    "a loaded state": lambda f: f.load_state_dict(doubled(f)),
    "a loaded permutation": lambda f: f[1].permutation.copy_(torch.tensor([0.0, 2, 1, 3, 4])),
    "an assigned state": lambda f: f.load_state_dict(doubled(f), assign=True),
    "a layer": lambda f: f.layers.__setitem__(0, randomize(Affine(D, residual, swap=True)).double()),
    "another layer": lambda f: f.layers.append(nn.Reverse(D)),
    "a conditioner": lambda f: setattr(f[0], "conditioner", randomize(residual(3, 4)).double()),
    "a linear layer": lambda f: setattr(f[0].conditioner, "last", torch.nn.Linear(6, 4).double()),
    "an activation": lambda f: f[0].conditioner.body.__setitem__(0, torch.nn.Tanh()),
    "all activations": lambda f: [f[0].conditioner.body.__setitem__(i, torch.nn.SiLU()) for i in (0, 2)],
    "no bias": lambda f: setattr(f[0].conditioner.first, "bias", None),
    "another width": lambda f: [
        setattr(f[0].conditioner.first, "weight", torch.nn.Parameter(torch.randn(9, 3).double())),
        setattr(f[0].conditioner.first, "bias", torch.nn.Parameter(torch.randn(9).double())),
        setattr(f[0].conditioner.body[1], "weight", torch.nn.Parameter(torch.randn(6, 9).double())),
    ],
    "a map": lambda f: setattr(f[0], "scale_map", ScaleMap("exp")),
    "an attribute of a network": lambda f: f[2].conditioner.blocks.__delitem__(0),
    "training": lambda f: f.train(not f.training),
}  # fmt: skip


@pytest.mark.parametrize("change", CHANGES)
def test_changes_are_seen(change, calls):
    flow, x, _ = make("affine")
    agrees(flow, x)
    before = flow(x)[0]
    with torch.no_grad():
        CHANGES[change](flow)
    agrees(flow, x)
    agrees(flow, x)
    assert change == "training" or not torch.allclose(flow(x)[0], before)
    assert calls


def without_bias(layer):
    del layer.bias
    return layer


BIASES = {
    "a buffer": lambda f: without_bias(f[0].conditioner.first).register_buffer("bias", torch.ones(7).double()),
    "an attribute": lambda f: setattr(without_bias(f[0].conditioner.first), "bias", torch.ones(7).double()),
    "of the context": lambda f: f[0].conditioner.context.__dict__.update(bias=torch.ones(7).double()),
}  # fmt: skip


@pytest.mark.parametrize("change", BIASES)
def test_a_bias_that_is_no_parameter_is_added(change):
    for seen_before in (False, True):
        flow, x, context = make("context of a coupling")
        if seen_before:
            agrees(flow, x, context)
        before = flow(x, context)[0]
        BIASES[change](flow)
        agrees(flow, x, context)
        assert not torch.allclose(flow(x, context)[0], before)


def test_tensors_on_meta_are_refused_as_the_layers_refuse_them():
    with torch.device("meta"):
        flow = flows.MAF(5, hidden=(8, 8), transforms=2).eval()
    with pytest.raises(RuntimeError, match="meta"):
        flow.log_prob(torch.randn(3, 5))


def test_a_tracer_meets_the_layers():
    flow, x = flows.MAF(5, hidden=(8, 8)).eval(), torch.randn(3, 5)
    torch.testing.assert_close(torch.jit.trace(flow, x, check_trace=False)(x), flow(x))


def test_fake_tensors_meet_the_layers():
    flow = nn.Sequential(nn.Reverse(5), Affine(5, mlp), nn.InvertibleLinear(5)).eval()
    x = torch.randn(3, 5)
    flow(x)
    with FakeTensorMode(allow_non_fake_inputs=True):
        assert flow(x)[0].shape == (3, 5)


def test_other_dtypes_are_left_to_the_layers(calls):
    flow, x, _ = make("affine", torch.float32)
    flow(x)
    assert len(calls) == 1
    for bad in (x.double(), x.half()):
        with pytest.raises((TypeError, RuntimeError)) as found:
            flow(bad)
        with pytest.raises((TypeError, RuntimeError)) as expected:
            by_layers(flow, bad)
        assert str(found.value) == str(expected.value)
    agrees(flow.double(), x.double())
    with pytest.raises(ValueError, match="x must have 5 channels"):
        flow(x[:, :4].double())


def test_softplus_of_torch_is_not_ours_in_float64(calls):
    torch.manual_seed(0)
    flow = nn.Sequential(Affine(D, partial(mlp, activation=torch.nn.Softplus)))
    x = torch.randn(3, D)
    agrees(flow, x)
    assert len(calls) == 1
    agrees(flow.double(), x.double())
    assert len(calls) == 1


def test_a_context_that_does_not_fit_is_refused_by_the_layers(calls):
    flow, x, context = make("context")
    for bad, message in ((None, "context must have shape"), (context[:, :1], "must have shape")):
        with pytest.raises(ValueError, match=message):
            flow(x, bad)
    flow, x, _ = make("affine")
    with pytest.raises(ValueError, match="context was given"):
        flow(x, context)
    assert not calls


def test_an_actnorm_runs_itself_until_it_has_seen_data(calls):
    torch.manual_seed(0)
    flow = nn.Sequential(nn.ActNorm(D), Affine(D, mlp), nn.ActNorm(D), Affine(D, mlp, swap=True))
    flow, x = flow.double(), 5 * torch.randn(200, D).double() + 3
    z, _ = flow(x)
    assert z[:, :2].mean(0).abs().max() < 1e-4
    assert len(calls) == 2  # the couplings, each alone
    calls.clear()
    agrees(flow, x)
    assert len(calls) == 1
    for p in flow.parameters():
        torch.nn.init.normal_(p)
    flow.load_state_dict(flow.state_dict())  # nobody knows any more whether it has seen data
    agrees(flow.eval(), x)
    loss = flow(x)[1].sum()
    flow[0].log_scale.data.add_(1)  # as the start of training may do while the graph holds a copy
    loss.backward()
    assert flow[0].log_scale.grad is not None


# --- the layers are called where anything hangs on them ------------------------------------------


class Louder(Affine):
    """A layer of the user."""

    def forward(self, x, context=None):
        z, log_det = super().forward(x, context)
        return 2 * z, log_det + D * torch.log(torch.tensor(2.0, dtype=x.dtype))


class Louder1(torch.nn.Linear):
    def forward(self, x):
        return 2 * functional.linear(x, self.weight, self.bias)


def hooked(module):
    return lambda f: module(f).register_forward_hook(lambda m, args, out: None)


OBSTACLES = {
    "hook of a layer": hooked(lambda f: f[0]),
    "hook of a network": hooked(lambda f: f[0].conditioner),
    "hook of a linear layer": hooked(lambda f: f[0].conditioner.first),
    "hook of an activation": hooked(lambda f: f[0].conditioner.body[0]),
    "hook before": lambda f: f[0].register_forward_pre_hook(lambda m, args: None),
    "backward hook": lambda f: f[2].register_full_backward_hook(lambda m, a, b: None),
    "hook of all modules": lambda f: torch.nn.modules.module.register_module_forward_hook(
        lambda m, args, out: None
    ),
}


@pytest.mark.parametrize("kind", OBSTACLES)
def test_hooks_are_run_while_they_are_there(kind, calls):
    flow, x, _ = make("affine")
    flow(x)
    calls.clear()
    handle = OBSTACLES[kind](flow)
    for _ in range(2):
        agrees(flow, x)
    assert not any(len(program.steps) == 3 for program in calls)
    handle.remove()
    calls.clear()
    flow(x)
    assert [len(program.steps) for program in calls] == [3]


def test_hooks_may_change_results(calls):
    flow, x, _ = make("affine")
    before = flow(x)[0]
    for module in (flow[0], flow[0].conditioner, flow[0].conditioner.body[1]):
        double = lambda m, a, o: (2 * o[0], o[1]) if isinstance(o, tuple) else 2 * o  # noqa: E731
        handle = module.register_forward_hook(double)
        assert not torch.allclose(flow(x)[0], before)
        agrees(flow, x)
        handle.remove()
        torch.testing.assert_close(flow(x)[0], before)


REPLACEMENTS = {
    "a subclass of a layer": lambda f: setattr(f[0], "__class__", Louder),
    "a subclass of a linear layer": lambda f: setattr(f[0].conditioner.first, "__class__", Louder1),
    "a forward of the instance": lambda f: setattr(
        f[0].conditioner.first, "forward", lambda x: f[0].conditioner.first.weight.sum() + x @ torch.ones(3, 7).double()
    ),
    "a parametrization": lambda f: parametrizations.weight_norm(f[0].conditioner.first),
    "two activations": lambda f: f[0].conditioner.body.__setitem__(0, torch.nn.Tanh()),
    "a slope": lambda f: [f[0].conditioner.body.__setitem__(i, torch.nn.LeakyReLU(0.3)) for i in (0, 2)],
    "a dropout": lambda f: f[0].conditioner.body.append(torch.nn.Dropout(0.0)),
}  # fmt: skip


@pytest.mark.parametrize("kind", REPLACEMENTS)
def test_what_is_not_known_is_called(kind, calls):
    flow, x, _ = make("affine")
    flow(x)
    calls.clear()
    REPLACEMENTS[kind](flow)
    agrees(flow, x)
    assert not any(len(program.steps) == 3 for program in calls)
    assert any(isinstance(layer, nn.AffineCoupling) for layer in flow)


def test_an_inverse_of_the_instance_is_called(calls):
    flow, z, _ = make("affine")
    flow[0].inverse = lambda z, context=None: (z * 0, z[:, 0])
    torch.testing.assert_close(flow.inverse(z)[0], z * 0)
    assert not any(len(program.steps) == 3 for program in calls)


@pytest.mark.parametrize("around", ["flow", "bijection"])
def test_hooks_of_a_flow_are_run_by_its_density(around, calls):
    flow, _ = trained("MAF", 1)
    x, seen = torch.randn(4, D), []
    expected = flow.log_prob(x)
    module = flow if around == "flow" else flow.bijection
    module.register_forward_hook(lambda m, args, out: seen.append(m))
    torch.testing.assert_close(flow.log_prob(x), expected)
    assert seen == [module]


def test_bases_and_flows_of_the_user_are_called(calls):
    flow, _ = trained("MAF", 1)
    x = torch.randn(4, D)
    expected = flow.log_prob(x)
    flow.base.log_prob = lambda z: z.new_zeros(len(z))
    torch.testing.assert_close(flow.log_prob(x), flow(x)[1])

    class Shifted(flows.MAF):
        def forward(self, x, context=None):
            z, log_det = super().forward(x, context)
            return z + 1, log_det

    shifted = Shifted(D, transforms=2, hidden=(8, 8))
    shifted.load_state_dict(flow.state_dict())
    z, log_det = shifted(x)
    torch.testing.assert_close(shifted.log_prob(x), shifted.base.log_prob(z) + log_det)
    assert not torch.allclose(shifted.log_prob(x), expected)


def test_autocast_transforms_and_references_call_the_layers(calls):
    flow, x, _ = make("affine", torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        flow(x)
    with use_reference():
        flow(x)
    torch.func.vmap(lambda v: flow(v[None])[0])(x)
    torch.func.jvp(lambda v: flow(v)[0], (x,), (x,))
    assert not calls
    flow(x)
    assert calls


def test_functional_calls_use_the_given_tensors(calls):
    flow, x, _ = make("affine")
    other = {name: 2 * p.detach() for name, p in flow.named_parameters()}
    before = flow(x)[0]
    found = torch.func.functional_call(flow, other, (x,))[0]
    assert len(calls) == 2
    torch.testing.assert_close(flow(x)[0], before)
    flow.load_state_dict(other, strict=False)
    torch.testing.assert_close(found, flow(x)[0])


def test_a_flow_that_is_first_run_in_inference_mode_is_trained():
    model, x = flows.MAF(3), torch.randn(5, 3)
    with torch.inference_mode():
        want = model.log_prob(x)
    found = model.log_prob(x)
    found.sum().backward()
    torch.testing.assert_close(found, want)


def test_runs_are_found_once_for_each_of_the_states_that_a_loop_goes_through(monkeypatch):
    """Training and evaluation in turns, of layers of which one is called in training."""
    found = []
    find = chain._find
    monkeypatch.setattr(chain, "_find", lambda layers: found.append(1) or find(layers))
    flow = nn.Sequential(Affine(D, mlp), nn.BatchNorm(D), Affine(D, mlp, swap=True))
    x = torch.randn(7, D)
    for _ in range(4):
        flow.train()(x)
        flow.eval()(x)
    assert len(found) == 2
    flow.layers[2] = Affine(D, mlp)
    flow(x)
    assert len(found) == 3
