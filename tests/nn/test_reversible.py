"""``memory="reversible"``: passes that keep no activations train as those that do."""

import copy
import warnings
from functools import partial

import pytest
import torch
import torch.distributed as dist
from cases.flows import FLOWS
from torch.func import functional_call
from torch.nn.parallel import DistributedDataParallel

from pyflowkern import flows, nn, use_reference
from pyflowkern.nn import _drift

#: Of float64, several layers there and back.
ROUNDING = 1e-10
DISCRETE = [case for case in FLOWS if not case.no_graph]


def twin(module):
    """Return a copy that keeps no activations."""
    other = copy.deepcopy(module)
    for part in other.modules():
        if isinstance(part, nn.Sequential):
            part.memory = "reversible"
    return other


def results(call, module, *inputs):
    """Return what a call gives, and the gradients of its inputs and of all parameters."""
    inputs = [
        t if t is None or not t.is_floating_point() else t.detach().requires_grad_()
        for t in inputs
    ]
    torch.manual_seed(0)
    y, log_det = call(*inputs)
    wanted = [t for t in (*inputs, *module.parameters()) if t is not None and t.requires_grad]
    options = {"allow_unused": True, "materialize_grads": True}
    grads = torch.autograd.grad((y**3).sum() + (log_det**2).sum(), wanted, **options)
    return [y.detach(), log_det.detach(), *grads, torch.rand(1)]


def same(found, wanted, tolerance=ROUNDING):
    for a, b in zip(found, wanted, strict=True):
        largest = max([1.0, *b.abs().flatten().tolist()])
        torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * largest)


def couplings(count=4, memory="reversible"):
    """Return couplings that no op replaces: of images."""
    layers = []
    for i in range(count):
        torch.manual_seed(i)
        layers.append(nn.AffineCoupling(4, partial(nn.ConvNet, hidden=4), swap=i % 2 == 1))
        for p in layers[-1].parameters():
            torch.nn.init.normal_(p, std=0.3)
    return nn.Sequential(*layers, memory=memory).double()


IMAGES = torch.randn(5, 4, 2, 2, generator=torch.Generator().manual_seed(0)).double()


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


# --- errors on the way back ----------------------------------------------------------------------


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
