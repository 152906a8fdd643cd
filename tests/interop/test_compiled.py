"""Second derivatives and compilers meet the libraries' own code: flows are right, and compiled once."""

import copy

import pytest
import torch
from laws.draws import normal
from nflows import distributions, flows, transforms
from torch._dynamo.testing import CompileCounter
from zuko.flows import MAF, NICE

import pyflowkern

D, K, N = 4, 3, 5
CLOSE = {"rtol": 1e-10, "atol": 1e-10}


class OfNflows(torch.nn.Module):
    """A flow of nflows, whose log-density is called."""

    def __init__(self):
        super().__init__()
        masked = [
            transforms.MaskedAffineAutoregressiveTransform(D, 8, K, num_blocks=1) for _ in range(2)
        ]
        parts = [masked[0], transforms.ReversePermutation(D), masked[1]]
        base = distributions.StandardNormal([D])
        self.flow = flows.Flow(transforms.CompositeTransform(parts), base)

    def forward(self, x, c):
        return self.flow.log_prob(x, c)


class OfZuko(torch.nn.Module):
    """A flow of zuko, which is called with a context, and whose distribution is."""

    def __init__(self):
        super().__init__()
        self.flow = MAF(D, K, transforms=1, hidden_features=(8,))

    def forward(self, x, c):
        return self.flow(c).log_prob(x)


@pytest.fixture(params=[OfNflows, OfZuko])
def pair(request):
    torch.manual_seed(0)
    model = request.param().double()
    twin = copy.deepcopy(model)
    assert pyflowkern.accelerate(twin).accelerated
    return model, twin


def test_second_derivatives(pair):
    found = []
    for m in pair:
        x, c = normal(N, D).requires_grad_(), normal(N, K, seed=1).requires_grad_()
        (score,) = torch.autograd.grad(m(x, c).sum(), x, create_graph=True)
        leaves = [x, c, *m.parameters()]
        twice = torch.autograd.grad(
            score.square().sum(), leaves, allow_unused=True, materialize_grads=True
        )
        found.append([score, *twice])
    torch.testing.assert_close(*found, **CLOSE)


def test_a_compiled_flow_follows_its_parameters_and_is_compiled_once(pair):
    model, twin = pair
    made = []

    def backend(graph, _):
        made.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled, counts = torch.compile(twin, backend=backend), []
    for seed in range(3):
        x, c = normal(N, D, seed=seed), normal(N, K, seed=seed + 9)
        torch.testing.assert_close(compiled(x, c), model(x, c), **CLOSE)
        counts.append(len(made))
        for m in pair:
            m(x, c)  # between two calls, by ops
            with torch.no_grad():
                for p in m.parameters():
                    p.mul_(0.9)
    assert counts[0] > 0
    assert len(set(counts)) == 1


def test_distributions_of_wide_networks_are_compiled_once():
    flow = NICE(4, 0, transforms=2, hidden_features=(130, 130, 130))
    pyflowkern.accelerate(flow)
    x, distribution = normal(5, 4, dtype=torch.float32), flow()
    distribution.log_prob(x)  # what it consists of is made now
    counter = CompileCounter()
    compiled = torch.compile(lambda d, x: d.log_prob(x), backend=counter)
    for _ in range(4):  # calls without a look are counted
        torch.testing.assert_close(compiled(distribution, x), distribution.log_prob(x))
    assert counter.frame_count == 1
