"""Layers that are modified are called: hooks, pruning, weight_norm, replacements, quantization, FLOP counters."""

import warnings
from functools import partial

import pytest
import torch
from laws import normal, randomize
from torch.nn.utils import prune
from torch.utils.flop_counter import FlopCounterMode

from pyflowkern import flows, nn
from pyflowkern.ops import SplineMap

D = 4
LAYERS = {
    "MAF": lambda: nn.MaskedAutoregressive(D, (8, 8)),
    "residual MAF": lambda: nn.MaskedAutoregressive(D, (8, 8), residual=True, context_features=2),
    "splines": lambda: nn.MaskedAutoregressive(D, (8, 8), transform=SplineMap(bins=3)),
    "IAF": lambda: nn.Inverse(nn.MaskedAutoregressive(D, (8, 8))),
    "coupling": lambda: nn.AffineCoupling(D, partial(nn.MLP, hidden=8)),
    **{
        f"field, {time}": partial(nn.VectorFieldMLP, D, (8, 8), "tanh", time, context_features=k)
        for time, k in (("none", 0), ("concat", 2), ("concatsquash", 2))
    },
    **{
        f"convolutions, {time}": partial(
            nn.VectorFieldConv, D, (6,), "silu", time, context_features=k
        )
        for time, k in (("none", 0), ("concat", 2), ("concatsquash", 2))
    },
}
every_layer = pytest.mark.parametrize("name", LAYERS)


def make(name):
    torch.manual_seed(0)
    module = randomize(LAYERS[name](), 0.5).double()
    x = normal(5, D, *((3, 3) if "convolutions" in name else ()))
    inner = getattr(module, "conditioner", getattr(module, "bijection", module))
    inner = getattr(inner, "conditioner", inner)
    context = normal(5, 2, seed=1) if getattr(inner, "context_features", 0) else None
    layers = [inner.first, inner.body[1], inner.last] if name == "coupling" else inner.layers
    return module, x, context, layers


def results(module, x, context):
    """Return values and gradients of both directions, or of a field's velocity and divergence."""
    x = x.clone().requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if isinstance(module, nn.Bijection):
            pairs = [module(x, context), module.inverse(x, context)]
        else:
            probe = normal(*x.shape, seed=3)
            divergence = partial(module.velocity_and_divergence, 0.3, x, context=context)
            pairs = [
                divergence(probe=probe),
                divergence(method="exact"),
                [module(0.3, x, context)],
            ]
    values = [v for pair in pairs for v in pair]
    loss = sum((v**3).sum() for v in values)
    return [*values, *torch.autograd.grad(loss, [x, *module.parameters()], allow_unused=True)]


@every_layer
@pytest.mark.parametrize("kind", ["forward", "forward before", "backward", "of all modules"])
def test_hooks_run_and_change_nothing(name, kind):
    module, x, context, layers = make(name)
    expected, calls = results(module, x, context), []

    def hook(layer, *_):
        calls.append(layer)

    if kind == "of all modules":
        handles = [torch.nn.modules.module.register_module_forward_hook(hook)]
    else:
        register = {
            "forward": "register_forward_hook",
            "forward before": "register_forward_pre_hook",
            "backward": "register_full_backward_hook",
        }[kind]
        handles = [getattr(layer, register)(hook) for layer in layers]
    found = results(module, x, context)
    for handle in handles:
        handle.remove()
    assert {id(layer) for layer in layers} <= {id(layer) for layer in calls}
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)
    count = len(calls)
    torch.testing.assert_close(results(module, x, context), expected)
    assert len(calls) == count


@every_layer
def test_a_hook_may_change_the_output(name):
    module, x, context, layers = make(name)
    expected = results(module, x, context)[0]
    layers[0].register_forward_hook(lambda m, args, out: out + 1)
    assert not torch.allclose(results(module, x, context)[0], expected)


@every_layer
def test_a_forward_of_one_instance_is_called(name):
    """As offloading and adapters of other libraries put it there."""
    module, x, context, layers = make(name)
    expected = results(module, x, context)[0]
    inner = layers[0].forward
    layers[0].forward = lambda *args: inner(*args) + 1
    assert not torch.allclose(results(module, x, context)[0], expected)
    del layers[0].forward
    torch.testing.assert_close(results(module, x, context)[0], expected)


WRAPPERS = {
    "prune": lambda layer: prune.l1_unstructured(layer, "weight", 0.4),
    "old weight_norm": torch.nn.utils.weight_norm,
    "weight_norm": torch.nn.utils.parametrizations.weight_norm,
    "spectral_norm": torch.nn.utils.parametrizations.spectral_norm,
}


@every_layer
@pytest.mark.parametrize("wrapper", WRAPPERS)
@pytest.mark.filterwarnings("ignore")
def test_wrapped_weights_learn(name, wrapper):
    module, x, context, layers = make(name)
    for layer in layers:
        WRAPPERS[wrapper](layer)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.05)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        if isinstance(module, nn.Bijection):
            z, log_det = module(x, context)
            loss = (z.square().sum(1) / 2 - log_det).mean()
        else:
            loss = (module(0.3, x, context) - 1).square().mean()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
        for layer in layers:
            learned = [p for p in layer.parameters() if p.dim() > 1]
            assert all(p.grad is not None for p in learned)
    assert losses[-1] < losses[0]


class LowRank(torch.nn.Module):
    """An adapter in place of a layer, without a weight of its own."""

    def __init__(self, layer):
        super().__init__()
        self.base = layer.requires_grad_(False)
        self.down = torch.nn.Linear(layer.in_features, 2, bias=False, dtype=torch.float64)
        self.up = torch.nn.Linear(2, layer.out_features, bias=False, dtype=torch.float64)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


@pytest.mark.parametrize("name", [n for n in LAYERS if "conv" not in n])
@pytest.mark.filterwarnings("ignore:a layer of a masked network")
def test_adapters_learn_and_masks_hold(name):
    module, x, context, layers = make(name)
    if name == "coupling":
        module.conditioner.first = LowRank(layers[0])
    else:
        layers[1] = LowRank(layers[1])
    adapters = [m for m in module.modules() if isinstance(m, LowRank)]
    if isinstance(module, nn.Bijection):
        z, log_det = module(x, context)
        back, other = module.inverse(z, context)
        torch.testing.assert_close(back, x, rtol=1e-8, atol=1e-8)
        torch.testing.assert_close(other, -log_det, rtol=1e-8, atol=1e-8)
        row = None if context is None else context[:1]
        jacobian = torch.autograd.functional.jacobian(lambda v: module(v, row)[0][0], x[:1])[:, 0]
        torch.testing.assert_close(torch.linalg.slogdet(jacobian)[1], log_det[0])
        z.sum().backward()
    else:
        y, divergence = module.velocity_and_divergence(0.3, x, method="exact", context=context)
        (y.sum() + divergence.sum()).backward()
    assert all(m.up.weight.grad.abs().max() > 0 for m in adapters)


def test_slow_sampling_is_warned_of_once():
    layer = nn.MaskedAutoregressive(3, (4,))
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("default")
        layer.inverse(torch.zeros(2, 3))
        assert not found
        layer.conditioner.layers[0].register_forward_hook(lambda *_: None)
        for _ in range(3):
            layer.inverse(torch.zeros(2, 3))
    assert [str(w.message)[:32] for w in found] == ["a layer of a masked network has h"[:32]]


def test_a_replacement_must_fit():
    net = nn.MaskedMLP(3, 2, (4,))
    net.layers[0] = torch.nn.Sequential(torch.nn.Linear(3, 5))
    with pytest.raises(
        ValueError, match=r"must map 3 to 4 features, Sequential gives shape \(4, 5\)"
    ):
        net(torch.zeros(1, 3))


QUANTIZED = {
    "RealNVP": lambda: flows.RealNVP(4, steps=2, hidden=8),
    "Glow": lambda: flows.Glow(4, steps=2, hidden=8),
    "NSF": lambda: flows.NSF(4, transforms=2, hidden=(8, 8)),
    "NSF without residuals": lambda: flows.NSF(4, transforms=2, hidden=(8, 8), residual=False),
    "circular NSF": lambda: flows.NSF(4, transforms=2, hidden=(8, 8), circular=True),
    "autoregressive NSF": lambda: flows.NSF(4, transforms=2, hidden=(8, 8), autoregressive=True),
    "MAF": lambda: flows.MAF(4, transforms=2, hidden=(8, 8)),
    "conditional MAF": lambda: flows.MAF(4, transforms=2, hidden=(8, 8), context_features=2),
    "IAF": lambda: flows.IAF(4, transforms=2, hidden=(8, 8)),
    "FFJORD": lambda: flows.FFJORD(4, hidden=(8, 8)),
    "CNF": lambda: flows.CNF(4, hidden=(8, 8)),
}


@pytest.mark.parametrize("name", QUANTIZED)
@pytest.mark.filterwarnings("ignore")
def test_quantized_flows_run(name):
    flow = randomize(QUANTIZED[name](), 0.2).eval()
    quantized = torch.ao.quantization.quantize_dynamic(flow, {torch.nn.Linear})
    x = normal(64, 4, dtype=torch.float32).clamp(-3, 3)  # within the domain of angles, too
    context = normal(64, 2, dtype=torch.float32) if flow.context_features else None
    with torch.no_grad():
        expected, found = flow.log_prob(x, context), quantized.log_prob(x, context)
        assert quantized.sample(3, None if context is None else context[:3]).isfinite().all()
    # weights and activations have eight bits
    assert (found - expected).abs().median() < 0.3


@pytest.mark.parametrize("name", ["MAF", "NSF", "RealNVP", "autoregressive NSF"])
def test_flops_of_the_layers_are_counted(name):
    flow = QUANTIZED[name]()
    x = normal(10, 4, dtype=torch.float32)
    counter = FlopCounterMode(display=False)
    with counter:
        flow.eval().log_prob(x)
    layers = sum(m.weight.numel() for m in flow.modules() if isinstance(m, torch.nn.Linear))
    assert counter.get_total_flops() >= 2 * 10 * layers


class CountedLinear(nn.InvertibleLinear):
    """A replacement with a pass of its own."""

    calls = 0

    def forward(self, x, context=None):
        self.calls += 1
        return super().forward(x, context)


@pytest.mark.parametrize("kind", ["hook", "hook of all modules", "subclass", "wrapper"])
def test_parts_of_a_glow_step_are_called_where_anything_hangs_on_them(kind):
    torch.manual_seed(0)
    step, x = nn.GlowStep(4), torch.randn(16, 4, 3, 3)
    step(x)
    with torch.no_grad():
        step.linear.log_diag += 0.3  # a rotation's log-det of 0 would be missed by nobody
    expected, back = step(x), step.inverse(x)
    seen = []
    note = lambda module, *_: seen.append(type(module).__name__)  # noqa: E731
    handle = None
    if kind == "hook":
        step.actnorm.register_forward_hook(note)
        step.linear.register_forward_hook(note)
    elif kind == "hook of all modules":
        handle = torch.nn.modules.module.register_module_forward_hook(note)
    elif kind == "subclass":
        state = step.linear.state_dict()
        step.linear = CountedLinear(4)
        step.linear.load_state_dict(state)
    else:
        step.actnorm = nn.Sequential(step.actnorm)
    try:
        found = step(x)
        for ours, plain in ((found, expected), (step.inverse(x), back)):
            torch.testing.assert_close(ours, plain)
    finally:
        if handle is not None:
            handle.remove()
    if "hook" in kind:
        assert {"ActNorm", "InvertibleLinear"} <= set(seen)
    if kind == "subclass":
        assert step.linear.calls == 1
