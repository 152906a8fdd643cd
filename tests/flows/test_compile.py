"""Flows compile into one graph, with the same results as in eager mode."""

import math

import pytest
import torch
from laws import normal, randomize
from torch.utils._python_dispatch import TorchDispatchMode

from pyflowkern import flows, nn, ops
from pyflowkern.ops import ScaleMap
from pyflowkern.ops.scale_map import KINDS

# --- samples of any number ---

SMALL = {"transforms": 2, "hidden": 8}


@pytest.mark.parametrize(
    "base", [flows.StandardNormal(3), flows.MixtureOfGaussians(3, 2), flows.Uniform(3)], ids=str
)
def test_bases_compile_for_every_number(base):
    sample = torch.compile(base.sample, fullgraph=True, backend="eager")
    for n in (5, 9, 2):
        torch.manual_seed(0)
        found = sample(n)
        torch.manual_seed(0)
        torch.testing.assert_close(found, base.sample(n))


def test_samples_compile_for_every_number():
    """For a flow of one linear layer; only the number of samples matters here."""
    flow = randomize(flows.Flow(nn.InvertibleLinear(3), (3,))).eval()
    sample = torch.compile(flow.sample, fullgraph=True, backend="eager")
    pair = torch.compile(flow.sample_and_log_prob, fullgraph=True, backend="eager")
    draw = torch.compile(lambda n: flow.distribution().rsample((n,)), backend="eager")
    for n in (5, 9, 2):
        torch.manual_seed(0)
        found = sample(n)
        torch.manual_seed(0)
        torch.testing.assert_close(found, flow.sample(n))
        assert [len(t) for t in pair(n)] == [n, n]
        assert len(draw(n)) == n


def test_gaussian_probes_compile_for_every_number():
    draw = torch.compile(
        lambda x: ops.draw_probe(x, kind="gaussian"), fullgraph=True, backend="eager"
    )
    for n in (5, 9, 2):
        assert draw(torch.zeros(n, 3)).shape == (1, n, 3)


def test_adaptive_steps_run_outside_of_graphs():
    flow, x = flows.CNF(2, (8,)).eval(), torch.randn(4, 2)
    found = torch.compile(flow.log_prob, backend="eager")(x)
    torch.testing.assert_close(found, flow.log_prob(x), rtol=1e-4, atol=1e-4)


# --- numbers that a graph can hold ---

FIXED = {"method": "midpoint", "step_size": 0.5}
BUILDS = {
    "MAF": (lambda: flows.MAF(3, **SMALL), (3,)),
    "IAF": (lambda: flows.IAF(3, **SMALL), (3,)),
    "NSF": (lambda: flows.NSF(3, **SMALL), (3,)),
    "NSF autoregressive": (lambda: flows.NSF(3, autoregressive=True, **SMALL), (3,)),
    "angles": (lambda: flows.NSF(3, circular=True, **SMALL), (3,)),
    "RealNVP": (lambda: flows.RealNVP(3, steps=2, hidden=8), (3,)),
    "Glow": (lambda: flows.Glow(3, steps=2, hidden=8), (3,)),
    "Glow image": (lambda: flows.Glow((1, 4, 4), levels=1, steps=1, hidden=4), (1, 4, 4)),
    "CNF": (lambda: flows.CNF(3, (8,), **FIXED), (3,)),
}


class FloatArguments(TorchDispatchMode):
    """Records the floating-point arguments of this package's ops."""

    def __init__(self):
        super().__init__()
        self.found, self.names = [], []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyflowkern":
            self.names.append(func.name())
            for value in (*args, *(kwargs or {}).values()):
                numbers = value if isinstance(value, (list, tuple)) else [value]
                self.found += [(func.name(), v) for v in numbers if isinstance(v, float)]
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("build", [flows.MAF, flows.RealNVP])
def test_ops_are_given_finite_numbers(build, kind):
    """AOTInductor cannot store infinities, such as the missing upper limit of a scale map."""
    small = {"transforms": 2} if build is flows.MAF else {"steps": 2}
    check_finite_arguments(build(3, hidden=8, scale_map=ScaleMap(kind), **small))


@pytest.mark.parametrize("name", BUILDS)
def test_ops_of_every_flow_are_given_finite_numbers(name):
    build, shape = BUILDS[name]
    check_finite_arguments(build(), *shape)
    if name == "CNF":
        check_finite_arguments(flows.CNF(3, (8,)))
        for options in ({"control": "sample"}, {"adjoint": "continuous"}, {"control": "device"}):
            check_finite_arguments(flows.CNF(3, (8,), **options))


def check_finite_arguments(flow, *shape):
    flow = randomize(flow).eval()
    with FloatArguments() as calls:
        x = normal(4, *(shape or (3,)), dtype=torch.float32)
        flow.log_prob(x).sum().backward()
        flow.sample(3)
    assert calls.names
    assert all(math.isfinite(value) for _, value in calls.found), calls.found
