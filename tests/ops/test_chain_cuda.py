"""Chains on CUDA, run on the host: launches, what is kept of a program, and every place for the rows of a tile."""

import ctypes
from contextlib import contextmanager

import on_host
import pytest
import torch
from cases.chain import autoregressive, coupling, sample, value
from laws import normal
from laws.ops import results, run

from pyflowkern import flows, ops
from pyflowkern.ops import ActNormStep, ChainProgram, ElementsStep, PLUStep, SplineMap
from pyflowkern.ops.chain import run_chain


@pytest.fixture
def host(cuda_on_host):
    """CUDA's kernels on the host: what counts launches, and sets what a device says of itself."""
    loaded = ctypes.CDLL(str(cuda_on_host))
    loaded.pfk_launches.restype = ctypes.c_int64

    class Host:
        def launches(self, call):
            before = loaded.pfk_launches()
            call()
            return loaded.pfk_launches() - before

        @contextmanager
        def shared(self, size):
            loaded.pfk_limit_shared(ctypes.c_int64(size))
            try:
                yield
            finally:
                loaded.pfk_limit_shared(ctypes.c_int64(48 * 1024))

        @contextmanager
        def captured(self):
            loaded.pfk_capture(ctypes.c_int64(1))
            try:
                yield
            finally:
                loaded.pfk_capture(ctypes.c_int64(0))

    with on_host.kernels(cuda_on_host):
        yield Host()


FLOWS = {
    "MAF": lambda t: flows.MAF(4, transforms=t, hidden=(9, 8)),
    "conditional MAF": lambda t: flows.MAF(4, transforms=t, hidden=(9,), context_features=3),
    "NSF": lambda t: flows.NSF(4, transforms=t, hidden=(9, 9), bins=4),
    "NSF (AR)": lambda t: flows.NSF(4, transforms=t, hidden=(9,), bins=4, autoregressive=True),
    "RealNVP": lambda t: flows.RealNVP(4, steps=t, hidden=8),
    "Glow": lambda t: flows.Glow(4, steps=t, hidden=8),
}


@pytest.mark.parametrize("name", FLOWS)
@pytest.mark.parametrize("transforms", [1, 5, 20])
def test_a_flow_is_three_launches(host, name, transforms):
    """Whatever its depth: one for the density, two for all gradients."""
    flow, x = FLOWS[name](transforms), torch.randn(20, 4)
    context = (torch.randn(20, 3),) if flow.context_features else ()

    def step():
        flow.log_prob(x, *context).mean().backward()

    with torch.no_grad():
        flow.log_prob(x, *context)  # the first batch initializes ActNorms
        flow.log_prob(x, *context)  # the first call copies the program
        assert host.launches(lambda: flow.log_prob(x, *context)) == 1
    step()
    assert host.launches(step) == 3


def test_more_tensors_than_a_kernel_takes_by_value(host):
    steps = [coupling("additive", 2, (), swap=i % 2 == 1) for i in range(230)]
    given = sample(20, 2, steps)
    assert len(given.fixed["program"].tensors) == 460

    def derivatives(function):
        x, *tensors = (
            t.detach().requires_grad_() for t in (given.tensors["x"], *given.tensors["tensors"])
        )
        z, log_det = function(x, given.fixed["program"], tensors)
        return [z, log_det, *torch.autograd.grad(z.square().sum(), [x, *tensors])]

    found, expected = derivatives(ops.chain), derivatives(ops.chain_reference)
    torch.testing.assert_close(found, expected)
    assert host.launches(lambda: derivatives(ops.chain)) == 2 + 4


def test_tiles_and_tasks_of_large_batches(host):
    """More tiles than blocks where rows lie in global memory, and several tiles in a task."""
    steps = [coupling("tanh", 3, (4,)), ActNormStep(), PLUStep(), coupling("tanh", 3, (4,), True)]
    program = ChainProgram(3, steps, base="normal")
    tensors = [value(w, i, torch.float64) for i, w in enumerate(program.tensors)]
    floating = [i for i, t in enumerate(tensors) if t.is_floating_point()]
    for i in floating:
        tensors[i].requires_grad_()
    wanted, results = [tensors[i] for i in floating if i != 10], []
    x = normal(8300, 3)
    weight = normal(8300)
    for function in (ops.chain_reference, ops.chain):
        with host.shared(0):
            z, log_prob = function(x, program, tensors)
            grads = torch.autograd.grad((log_prob * weight).sum(), wanted, allow_unused=True)
        results.append([z, log_prob, *grads])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rows_give_the_same_bits_wherever_they_lie(host, dtype):
    """GPUs differ in how much shared memory they have, and must give the same."""
    smap = SplineMap("quadratic", bins=5)
    steps = [autoregressive(smap, [2, 0, 1], (70, 60)), PLUStep(), coupling("tanh", 3, (130,))]
    given = sample(40, 3, steps, dtype, "normal")

    def call(x, tensors, program, constants, **_):
        tensors = list(tensors)
        for i, t in constants:
            tensors.insert(i, t)
        return ops.chain(x, program, tensors)

    found = []
    for size in (0, 48 << 10, 227 << 10):
        with host.shared(size):
            found.append(results(run(call, given)))
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


def program_and_tensors(features, seed=0):
    program = ChainProgram(features, [coupling("tanh", features, (5,)), PLUStep()])
    return program, [value(w, i + seed, torch.float32) for i, w in enumerate(program.tensors)]


def test_a_program_is_copied_once(host):
    """Also for other tensors, other numbers of samples and programs that are equal; each dtype has its own."""
    program, tensors = program_and_tensors(7)
    first = host.launches(lambda: ops.chain(torch.randn(3, 7), program, tensors))
    assert first > 1
    again, others = program_and_tensors(7, 50)
    assert host.launches(lambda: ops.chain(torch.randn(30, 7), again, others)) == 1
    wide = [t.double() if t.is_floating_point() else t for t in tensors]
    call = lambda: ops.chain(torch.randn(3, 7).double(), program, wide)  # noqa: E731
    assert host.launches(call) > 1
    assert host.launches(call) == 1


def test_a_program_that_is_new_to_a_graph_is_copied_in_it(host):
    """The copy is a part of the graph: an uncaptured call must not count on it."""
    program, tensors = program_and_tensors(9)
    x = torch.randn(3, 9)
    call = lambda: ops.chain(x, program, tensors)  # noqa: E731
    expected = ops.chain_reference(x, program, tensors)
    with host.captured():
        copied = host.launches(call)
        assert copied > 1
        assert host.launches(call) == copied
        torch.testing.assert_close(call(), expected)
    assert host.launches(call) == copied
    assert host.launches(call) == 1
    with host.captured():
        assert host.launches(call) == 1


def test_tensors_are_compared_with_a_known_program(host):
    program, tensors = program_and_tensors(5)
    x = torch.randn(3, 5)
    run_chain(x, None, program, tensors)
    for i, bad in ((0, torch.zeros(5, 4)), (1, torch.zeros(5, 1)), (5, torch.zeros(5, 5, 1))):
        given = [bad if k == i else t for k, t in enumerate(tensors)]
        with pytest.raises(RuntimeError, match=f"tensor {i} has"):
            run_chain(x, None, program, given)


def test_indices_out_of_range_give_nan(host):
    """A check would wait for the device."""
    program = ChainProgram(3, [PLUStep(), ElementsStep("exp", [0])])
    tensors = [value(w, i, torch.float32) for i, w in enumerate(program.tensors)]
    for bad in (-1, 3):
        tensors[0] = torch.tensor([0, bad, 1])
        z, _ = ops.chain(torch.randn(4, 3), program, tensors)
        assert z[:, 1].isnan().all()
        assert z[:, ::2].isfinite().all()
        back, _ = ops.chain(torch.randn(4, 3), program, tensors, inverse=True)
        assert back.isnan().all()
