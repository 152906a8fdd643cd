"""Batches of pairs from plans that a thread solves ahead of time."""

import os
import threading

import pytest
import torch

from pyflowkern import transport
from pyflowkern.transport._ahead import Ahead


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def batches(**options):
    pairs = transport.PairedBatches(
        lambda n: torch.randn(n, 2, generator=options["generator"]),
        torch.randn(300, 2, generator=seeded()),
        plan_size=64,
        batch_size=32,
        **options,
    )
    return [next(stream) for stream in [iter(pairs)] for _ in range(5)]


def test_a_thread_that_works_ahead_changes_no_number():
    one, other = (batches(generator=seeded(), ahead=ahead) for ahead in (True, False))
    for a, b in zip(one, other, strict=True):
        assert torch.equal(a[0], b[0])
        assert torch.equal(a[1], b[1])


@pytest.mark.parametrize("ahead", [True, False])
def test_a_source_may_give_the_same_memory_again(ahead):
    memory, count = torch.empty(64, 2), iter(range(1, 100))
    pairs = transport.PairedBatches(
        lambda n: memory.fill_(next(count)),
        torch.randn(64, 2),
        plan_size=64,
        batch_size=32,
        ahead=ahead,
    )
    means = [float(x0.mean()) for _, (x0, _) in zip(range(4), pairs, strict=False)]
    assert means == [1, 1, 2, 2]


def test_work_ahead_runs_on_one_thread():
    work = Ahead(torch.get_num_threads, threaded=True)
    work.start()
    assert work.result() == 1


def test_what_goes_wrong_ahead_is_raised_where_it_is_asked_for():
    x = torch.randn(64, 2)
    sizes = iter((1.0, float("nan")))
    pairs = transport.PairedBatches(
        lambda n: x * next(sizes), x, plan_size=64, batch_size=32, ahead=True
    )
    stream = iter(pairs)
    next(stream)
    next(stream)
    with pytest.raises(ValueError, match="x0 must be finite"):
        next(stream)


def test_the_thread_ends_with_its_iterator_and_keeps_the_others_as_they_are():
    threads = torch.get_num_threads()
    before = set(threading.enumerate())
    x = torch.randn(64, 2)
    stream = iter(transport.PairedBatches(x, x, plan_size=64, batch_size=32, ahead=True))
    next(stream)
    mine = set(threading.enumerate()) - before
    assert len(mine) == 1
    assert torch.get_num_threads() == threads
    stream.close()
    for thread in mine:
        thread.join(timeout=10)
        assert not thread.is_alive()


def test_a_forked_process_calls_at_once():
    work = Ahead(lambda x: x + 1, threaded=True)
    work.start(1)
    assert work.result() == 2
    if (child := os.fork()) == 0:
        os._exit(work.result())
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 2
    work.close()


def test_wrong_arguments_of_paired_batches():
    x = torch.randn(10, 2)
    for sides, options, error, match in (
        ((x, x), {"plan_size": 16}, ValueError, "source must have at least plan_size"),
        ((x, x), {"plan_size": 8, "batch_size": 3}, ValueError, "batch_size must divide"),
        ((x, None), {"plan_size": 8, "batch_size": 4}, TypeError, "target must be"),
    ):
        with pytest.raises(error, match=match):
            transport.PairedBatches(*sides, **{"batch_size": 4, **options})
    part = transport.OTPlanSampler("partial", mass=0.5)
    with pytest.raises(ValueError, match="sampler must give every sample a partner"):
        transport.PairedBatches(x, x, plan_size=8, batch_size=4, sampler=part)
    short = transport.PairedBatches(lambda n: x[:3], x, plan_size=8, batch_size=4)
    with pytest.raises(ValueError, match="source must return a tensor of 8"):
        next(iter(short))
