"""``memory="reversible"``: passes that keep no activations train as those that do."""

import copy
import gc
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases.flows import FLOWS
from laws.reversible import IMAGES, couplings, results, same, twin
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from pyflowkern import flows, nn, use_reference
from pyflowkern.nn._again import Walk

DISCRETE = [case for case in FLOWS if not case.no_graph]


@pytest.mark.parametrize("case", DISCRETE, ids=str)
def test_gradients_of_flows_are_the_stored_ones(case):
    """Of vectors the layers are called where the reference runs, and one op replaces them elsewhere."""
    module, x, context = case.make(n=6)
    module.train()
    z = module(x, context)[0].detach()
    other = twin(module)
    with use_reference(len(case.shape) == 1), warnings.catch_warnings():
        warnings.simplefilter("error")
        same(results(other, other, x, context), results(module, module, x, context))
        found = results(other.inverse, other, z, context)
        same(found, results(module.inverse, module, z, context))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_dropout_and_autocast_are_those_of_the_first_call(dtype):
    class Network(nn.MLP):
        def forward(self, h, context=None):
            return torch.nn.functional.dropout(super().forward(h, context), 0.3, self.training)

    network = partial(Network, hidden=8, context_features=2)
    layers = [nn.AffineCoupling(4, network, swap=i % 2 == 1) for i in range(3)]
    for layer in layers:
        torch.nn.init.normal_(layer.conditioner.last.weight)
    stored = nn.Sequential(*layers, nn.Permutation([1, 3, 0, 2]))
    x, context = torch.randn(50, 4), torch.randn(50, 2)
    other = twin(stored)
    # rounding to 8 bits may fall otherwise where an input differs in the last of 24
    tolerance = 1e-5 if dtype is None else 0.02
    for mode in (stored.train, stored.eval):
        other.train(mode() is stored and stored.training)
        for call in ("__call__", "inverse"):
            with torch.autocast("cpu", dtype, enabled=dtype is not None):
                torch.manual_seed(0)
                wanted = results(getattr(stored, call), stored, x, context)
                found = results(getattr(other, call), other, x, context)
            same(found, wanted, tolerance)


def test_kept_memory_does_not_grow_with_depth():
    def kept(steps, memory):
        flow = flows.Glow((3, 8, 8), levels=2, steps=steps, hidden=8, memory=memory)
        own = {t.untyped_storage().data_ptr() for t in (*flow.parameters(), *flow.buffers())}
        found = {}

        def note(t):
            storage = t.untyped_storage()
            if storage.data_ptr() not in own:
                found[storage.data_ptr()] = storage.nbytes()
            return t

        with torch.autograd.graph.saved_tensors_hooks(note, lambda t: t):
            flow.log_prob(torch.randn(4, 3, 8, 8)).sum()
        return sum(found.values())

    assert kept(2, "reversible") == kept(6, "reversible") < kept(2, "stored") < kept(6, "stored")


def test_layers_whose_way_back_costs_much_keep_their_inputs():
    maf = nn.Sequential(*[nn.MaskedAutoregressive(4, (256,)) for _ in range(3)]).double()
    other, calls = twin(maf), []
    for layer in other:
        layer.inverse = lambda *_: calls.append(1)
    x = torch.randn(5, 4).double()
    same(results(other, other, x), results(maf, maf, x))
    assert not calls
    one_solve = nn.Sequential(
        flows.ContinuousBijection(nn.VectorFieldMLP(3, (4,)), method="rk4", step_size=0.5),
        nn.Reverse(3),
    ).double()
    other = twin(one_solve)
    same(results(other, other, x[:, :3]), results(one_solve, one_solve, x[:, :3]))


# --- what a second call must not do --------------------------------------------------------------


def test_statistics_are_taken_once():
    class Network(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.norm, self.last = (
                torch.nn.BatchNorm2d(inputs),
                torch.nn.Conv2d(inputs, outputs, 1),
            )

        def forward(self, x):
            return self.last(self.norm(x))

    layers = [
        nn.ActNorm(4),
        nn.AffineCoupling(4, Network),
        nn.BatchNorm(4),
        nn.AffineCoupling(4, Network),
    ]
    stored = nn.Sequential(*layers).double()
    other = twin(stored)
    for _ in range(3):
        same(results(other, other, 3 * IMAGES), results(stored, stored, 3 * IMAGES), 1e-9)
        torch.testing.assert_close(dict(other.named_buffers()), dict(stored.named_buffers()))
        assert float(other[2].batches) == float(stored[2].batches)
    back, again = (twin(nn.Sequential(nn.ActNorm(4), nn.ActNorm(4)).double()) for _ in range(2))
    back.memory = "stored"
    same(results(again.inverse, again, 3 * IMAGES), results(back.inverse, back, 3 * IMAGES))
    assert float(again[0].initialized) == 1


def test_hooks_run_once_and_modes_are_those_of_the_call():
    flow, calls = couplings(), []
    flow[1].register_forward_hook(lambda *_: calls.append("layer"))
    flow[2].conditioner.last.weight.register_hook(lambda g: (calls.append("gradient"), 2 * g)[1])
    flow[3].conditioner.last.register_forward_hook(lambda *_: calls.append("part"))
    z, log_det = flow(IMAGES)
    flow.eval()
    (z.sum() + log_det.sum()).backward()
    assert sorted(calls) == ["gradient", "layer", "part"]
    assert not any(m.training for m in flow.modules())
    found = [p.grad for p in flow.parameters()]
    flow.memory = "stored"
    flow.zero_grad()
    z, log_det = flow(IMAGES)
    (z.sum() + log_det.sum()).backward()
    same(found, [p.grad for p in flow.parameters()])


# --- ways to ask for gradients -------------------------------------------------------------------


def test_graphs_are_used_as_any_other():
    """Twice, in one loss and again, with an input used elsewhere, for some inputs alone, with frozen layers."""
    flow = couplings()
    for p in flow[1].parameters():
        p.requires_grad_(False)
    stored = copy.deepcopy(flow)
    stored.memory = "stored"
    found = []
    for f in (flow, stored):
        x = IMAGES.clone().requires_grad_()
        z, log_det = f(2 * x + 1)
        back, _ = f.inverse(z.flip(1) * x)
        loss = (back * x).sum() + (log_det**2).sum()
        first = torch.autograd.grad(loss, [x], retain_graph=True)
        some = torch.autograd.grad(
            loss, [flow[2].conditioner.last.weight, x][f is not flow :], retain_graph=True
        )
        loss.backward()
        found.append(
            [*first, some[-1], x.grad, *(p.grad for p in f.parameters() if p.requires_grad)]
        )
    same(*found)


def test_a_graph_that_is_kept_holds_nothing_of_a_backward_pass():
    """Also of one that ends between the layers, and where the first layer has its input at hand."""
    flow = couplings()
    for kept in (set(), {0}):
        z, log_det = flow(IMAGES.clone().requires_grad_())
        flow._guards[0].kept = kept
        loss = z.sum() + log_det.sum()
        torch.autograd.grad(loss, flow[2].conditioner.last.bias, retain_graph=True)
        loss.backward(retain_graph=True)
        walks = [
            each for each in gc.get_objects() if type(each) is Walk
        ]  # isinstance asks proxies of what is gone
        assert any(walk.guard is flow._guards[0] for walk in walks)
        assert not any(walk._reached for walk in walks)


def test_a_functional_call_has_the_gradients_of_its_tensors():
    flow = couplings()
    tensors = {name: (1.5 * p).detach().requires_grad_() for name, p in flow.named_parameters()}
    made = {
        name: t * 1.0 for name, t in tensors.items()
    }  # no leaves, and gone from the flow when backward runs
    z, log_det = functional_call(flow, made, (IMAGES,))
    found = torch.autograd.grad(z.sum() + log_det.sum(), list(tensors.values()))
    flow.memory = "stored"
    z, log_det = functional_call(flow, tensors, (IMAGES,))
    same(found, torch.autograd.grad(z.sum() + log_det.sum(), list(tensors.values())))


def test_a_change_of_weights_between_the_passes_is_an_error():
    flow = couplings()
    z, _ = flow(IMAGES)
    with torch.no_grad():
        flow[0].conditioner.last.bias.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


def test_second_derivatives_are_refused():
    flow, x = couplings(), IMAGES.clone().requires_grad_()
    first = torch.autograd.grad(flow(x)[1].sum(), x, create_graph=True)[0]
    flow.memory = "stored"
    same([first.detach()], [torch.autograd.grad(flow(x)[1].sum(), x)[0]])
    for wanted in (x, flow[0].conditioner.last.bias):
        with pytest.raises(RuntimeError, match="memory='stored'"):
            torch.autograd.grad(first.sum(), wanted, retain_graph=True)


def test_a_tensor_that_is_no_parameter_is_found():
    flow, scale = couplings(), torch.ones((), dtype=torch.float64, requires_grad=True)
    network = flow[1].conditioner
    forward = network.forward
    network.forward = lambda h, context=None: forward(h, context) * scale
    with pytest.raises(
        RuntimeError, match=r"reads a tensor of shape \(\) that requires a gradient"
    ):
        flow(IMAGES)[0].sum().backward()


def test_a_layer_may_differentiate_by_tensors_of_its_own():
    class Score(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.energy, self.last = torch.nn.Linear(1, 1), torch.nn.Conv2d(inputs, outputs, 1)

        def forward(self, h):
            with torch.enable_grad():
                own = h.detach().requires_grad_()
                energy = (self.energy(own[..., None]) ** 3).sum()
                score = torch.autograd.grad(energy, own, create_graph=True)[0]
            return self.last(h + score * own)

    stored = nn.Sequential(*[nn.AffineCoupling(4, Score) for _ in range(2)]).double()
    other = twin(stored)
    same(results(other, other, IMAGES), results(stored, stored, IMAGES))


def test_layers_that_exchange_sums_are_called_once():
    """As often in all processes, whatever their data say of errors."""
    calls = []

    class Network(torch.nn.Module):
        def __init__(self, inputs, outputs):
            super().__init__()
            self.norm, self.last = (
                torch.nn.SyncBatchNorm(inputs),
                torch.nn.Conv2d(inputs, outputs, 1),
            )

        def forward(self, h):
            calls.append(1)
            return self.last(h)

    flow = nn.Sequential(nn.AffineCoupling(4, Network), memory="reversible").double()
    flow(IMAGES)[0].sum().backward()
    assert len(calls) == 1


def test_ddp_sees_every_parameter_once():
    flow = couplings()
    other = copy.deepcopy(flow)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        model = DistributedDataParallel(other)
        for _ in range(2):
            model.zero_grad()
            z, log_det = model(IMAGES)
            (z.sum() + log_det.sum()).backward()
    finally:
        dist.destroy_process_group()
    z, log_det = flow(IMAGES)
    (z.sum() + log_det.sum()).backward()
    same([p.grad for p in other.parameters()], [p.grad for p in flow.parameters()])


# --- the option ----------------------------------------------------------------------------------


def test_the_option_is_checked_and_kept():
    with pytest.raises(ValueError, match="memory must be one of stored, reversible, got 'none'"):
        flows.MAF(3, memory="none")
    flow = flows.RealNVP(3, steps=1, hidden=4, memory="reversible").standardize()
    assert flow.bijection.memory == copy.deepcopy(flow).bijection.memory == "reversible"
    levels = flows.NSF(
        (1, 4, 4), levels=2, steps=1, hidden=4, memory="reversible"
    ).bijection.levels
    assert {level.memory for level in levels} == {"reversible"}
    assert nn.Sequential().memory == "stored"
    x = torch.randn(3, 2, requires_grad=True)
    assert nn.Sequential(memory="reversible")(x)[0] is x
