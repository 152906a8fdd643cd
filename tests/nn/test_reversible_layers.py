"""``memory="reversible"`` of layers and networks of all kinds: what a second call of them must not change."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from laws.reversible import IMAGES, couplings, results, same, twin
from torch.nn.utils.parametrizations import spectral_norm, weight_norm

from pyflowkern import nn


def test_a_layer_of_layers_that_take_statistics_is_called_once():
    class Both(nn.Bijection):
        def __init__(self):
            super().__init__()
            self.norm, self.coupling = nn.BatchNorm(4), couplings(1, "stored")[0]

        def forward(self, x, context=None):
            y, log_det = self.norm(x)
            z, more = self.coupling(y)
            return z, log_det + more

        def inverse(self, z, context=None):
            y, log_det = self.coupling.inverse(z)
            x, more = self.norm.inverse(y)
            return x, log_det + more

    stored = nn.Sequential(Both(), Both()).double()
    other = twin(stored)
    for _ in range(2):
        same(results(other, other, 3 * IMAGES), results(stored, stored, 3 * IMAGES), 1e-9)
        torch.testing.assert_close(dict(other.named_buffers()), dict(stored.named_buffers()))


def test_buffers_that_a_call_changes_are_the_same_in_both_calls_of_a_backward_pass():
    """Power iterations of a spectral norm, in a layer that is called twice as it may do anything."""

    class Own(nn.AffineCoupling):
        pass

    def network(inputs, outputs):
        return spectral_norm(torch.nn.Conv2d(inputs, outputs, 1))

    stored = nn.Sequential(*[Own(4, network, swap=i % 2 == 1) for i in range(3)]).double()
    other = twin(stored)
    for _ in range(2):
        same(results(other, other, IMAGES), results(stored, stored, IMAGES))
    torch.testing.assert_close(dict(other.named_buffers()), dict(stored.named_buffers()))


@pytest.mark.parametrize("after", [True, False])
def test_each_module_has_its_mode_of_the_call(after):
    """A normalization that is frozen in a flow that trains, and one whose mode changes before the backward pass."""

    def network(inputs, outputs):
        norm = torch.nn.BatchNorm2d(inputs)
        torch.nn.init.constant_(norm.running_var, 2.0)
        return torch.nn.Sequential(norm, torch.nn.Conv2d(inputs, outputs, 1))

    stored = nn.Sequential(
        *[nn.AffineCoupling(4, network, swap=i == 1) for i in range(3)]
    ).double()
    found = []
    for flow in (stored, twin(stored)):
        norms = [m for m in flow.modules() if isinstance(m, torch.nn.BatchNorm2d)]
        for norm in norms:
            norm.eval()
        z, log_det = flow(IMAGES)
        for module in norms if after else [flow]:
            module.train(after)
        (z.sum() + log_det.square().sum()).backward()
        assert all(norm.training is after for norm in norms)
        found.append([p.grad for p in flow.parameters()])
    same(found[1], found[0])


@pytest.mark.parametrize("of", ["input", "hooks", "buffers"])
def test_threads_leave_a_flow_its_tensors(of):
    """While a backward pass runs, a layer has copies of tensors that hooks watch, and of buffers that it changes."""

    def network(inputs, outputs):
        norm = [torch.nn.BatchNorm2d(inputs)] if of == "buffers" else []
        return torch.nn.Sequential(*norm, torch.nn.Conv2d(inputs, outputs, 1))

    flow = nn.Sequential(*[nn.AffineCoupling(4, network) for _ in range(2)], memory="reversible")
    flow.double()
    parameters, buffers = [*flow.parameters()], [*flow.buffers()]
    x = IMAGES.clone().requires_grad_(of == "input")
    for p in parameters:
        if of == "hooks":
            p.register_hook(lambda g: g)

    def work(_):
        for _ in range(30):
            z, log_det = flow(x)
            torch.autograd.grad(z.sum() + log_det.sum(), x if of == "input" else parameters)
        return True

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(4)))
    assert all(a is b for a, b in zip(flow.parameters(), parameters, strict=True))
    assert all(a is b for a, b in zip(flow.buffers(), buffers, strict=True))


def test_weights_that_a_parametrization_caches_have_gradients():
    """Those of the forward pass have no graph."""
    found = []
    for memory in ("reversible", "stored"):
        torch.manual_seed(0)
        layers = [
            nn.AffineCoupling(4, lambda i, o: weight_norm(torch.nn.Conv2d(i, o, 1)), swap=i == 1)
            for i in range(3)
        ]
        flow = nn.Sequential(*layers, memory=memory).double()
        with torch.nn.utils.parametrize.cached():
            found.append(results(flow, flow, IMAGES))
    same(*found)


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_networks_are_called_as_they_are():
    network = torch.jit.script(torch.nn.Conv2d(2, 4, 1))
    flow = nn.Sequential(nn.AffineCoupling(4, lambda i, o: network), memory="reversible").double()
    found = results(flow, flow, IMAGES)
    flow.memory = "stored"
    same(found, results(flow, flow, IMAGES))


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint8, torch.bfloat16, torch.float32])
def test_a_layer_may_change_the_dtype(dtype):
    class Whole(nn.Bijection):
        def __init__(self):
            super().__init__()
            self.scale = torch.nn.Parameter(torch.tensor(1.5))

        def forward(self, x, context=None):
            log_det = self.scale.abs().log().double().expand(len(x))
            return x.double() * self.scale, log_det * x[0].numel()

        def inverse(self, z, context=None):
            log_det = self.scale.abs().log().double().expand(len(z))
            return (z / self.scale).round().to(dtype), -log_det * z[0].numel()

    stored = nn.Sequential(Whole(), *couplings(2, "stored")).double()
    other, x = twin(stored), torch.arange(80).view(5, 4, 2, 2).to(dtype)
    same(results(other, other, x), results(stored, stored, x), 1e-9)


def test_products_under_autocast_have_another_dtype():
    class Product(nn.Bijection):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.eye(4) + 0.1)

        def forward(self, x, context=None):
            return x @ self.weight, torch.linalg.slogdet(self.weight)[1].expand(len(x))

        def inverse(self, z, context=None):
            log_det = -torch.linalg.slogdet(self.weight)[1].expand(len(z))
            return z @ torch.linalg.inv(self.weight), log_det

    stored = nn.Sequential(Product(), nn.Reverse(4), nn.AffineCoupling(4, nn.MLP), Product())
    other, x = twin(stored), torch.randn(5, 4)
    with torch.autocast("cpu", torch.bfloat16):
        same(results(other, other, x), results(stored, stored, x), 0.02)


def test_samples_may_be_numbers():
    class Scale(nn.Bijection):
        def __init__(self):
            super().__init__()
            self.log_scale = torch.nn.Parameter(torch.tensor(0.3))

        def forward(self, x, context=None):
            return x * self.log_scale.exp(), self.log_scale.expand(len(x))

        def inverse(self, z, context=None):
            return z * (-self.log_scale).exp(), -self.log_scale.expand(len(z))

    stored = nn.Sequential(Scale(), Scale()).double()
    other, x = twin(stored), torch.randn(5).double()
    same(results(other, other, x), results(stored, stored, x))
