"""A block of use_reference applies in its own thread and context only."""

import asyncio
import threading
from contextlib import ExitStack

import pytest
import torch

from pyflowkern import _library, ops, use_reference

X = torch.ones(2, 3)


@pytest.fixture(autouse=True)
def _has_kernels():
    _library.require_kernels("cpu")
    assert not runs_reference()


def runs_reference():
    return not _library.kernel_serves("affine", X, X)


def in_another_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_another_thread_still_uses_kernels():
    with use_reference():
        assert runs_reference()
        assert not in_another_thread(runs_reference)
    assert not runs_reference()


def test_overlapping_blocks_of_two_threads():
    first, second, entered = use_reference(), use_reference(), threading.Event()
    leave = threading.Event()

    def other():
        with second:
            entered.set()
            leave.wait()

    thread = threading.Thread(target=other)
    with first:
        thread.start()
        entered.wait()
    assert not runs_reference()
    leave.set()
    thread.join()
    assert not runs_reference()
    assert not in_another_thread(runs_reference)


def test_overlapping_blocks_of_one_thread():
    first, second = use_reference(), use_reference(False)
    first.__enter__()
    second.__enter__()
    assert not runs_reference()
    first.__exit__(None, None, None)
    assert not runs_reference()
    second.__exit__(None, None, None)
    assert not runs_reference()
    first, second = use_reference(), use_reference()
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    assert runs_reference()
    second.__exit__(None, None, None)
    assert not runs_reference()


def test_the_innermost_block_decides():
    with ExitStack() as stack:
        for enabled in (True, False, True):
            stack.enter_context(use_reference(enabled))
            assert runs_reference() == enabled


def test_each_task_has_its_own_setting():
    async def task(enabled, here, there):
        with use_reference(enabled):
            here.set()
            await there.wait()
            return runs_reference()

    async def both():
        a, b = asyncio.Event(), asyncio.Event()
        return await asyncio.gather(task(True, a, b), task(False, b, a))

    assert asyncio.run(both()) == [True, False]


def test_a_compiled_function_follows():
    @torch.compile(fullgraph=True, backend="eager")
    def which(x):
        return x * (2.0 if _library.kernel_serves("affine", x) else 3.0)

    @torch.compile(fullgraph=True, backend="eager")
    def which_inside(x):
        with use_reference():
            return x * (2.0 if _library.kernel_serves("affine", x) else 3.0)

    assert float(which(X)[0, 0]) == 2.0
    with use_reference():
        assert float(which(X)[0, 0]) == 3.0
        with use_reference(False):
            assert float(which(X)[0, 0]) == 2.0
    assert float(which(X)[0, 0]) == 2.0
    assert float(which_inside(X)[0, 0]) == 3.0
    assert not runs_reference()


def test_gradients_follow_the_setting_of_the_thread():
    """On the CPU the backward pass runs in the thread that calls it."""
    x = X.clone().requires_grad_()
    with use_reference():
        y, _ = ops.actnorm(x, X[0], X[0])
        assert "Eager" not in y.grad_fn.name()
    (grad,) = torch.autograd.grad(y.sum(), x)
    y, _ = ops.actnorm(x, X[0], X[0])
    assert "Eager" in y.grad_fn.name()
    torch.testing.assert_close(torch.autograd.grad(y.sum(), x)[0], grad)


def test_a_flag_must_be_a_bool():
    with pytest.raises(TypeError, match="enabled must be True or False, got 'no'"):
        use_reference("no").__enter__()
