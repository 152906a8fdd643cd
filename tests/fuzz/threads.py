"""Each call by several threads at once, on the same tensors and modules: each result is that of a thread alone.

Under the thread sanitizer it is also seen whether two threads touch the same memory, be it of the callers or of the
regions within a kernel.  The threads begin, and the call alone follows: what is made at the first call is then made by
several threads at once.
"""

import copy
import threading
from concurrent.futures import ThreadPoolExecutor

import torch

from fuzz import modules, ops
from fuzz.cases import TARGETS
from fuzz.check import Finding, outcome_of, same_bits
from fuzz.draw import MODES, Draw


class Threads:
    """Runs a case by so many threads."""

    def __init__(self, count):
        self.count = count
        self.pool = ThreadPoolExecutor(count)
        self.barrier = threading.Barrier(count)

    def at_once(self, function):
        """Return what each thread found."""

        def run(_):
            self.barrier.wait()
            return function()

        return list(self.pool.map(run, range(self.count)))

    def __call__(self, target, seed):
        """Run one case; raises ``Finding`` where threads find another result, or an error."""
        for function in functions(target, seed):
            found = self.at_once(function)
            alone, again = function(), function()
            if not same(alone, again):  # random numbers of a generator that all share
                continue
            for k, result in enumerate(found):
                if not same(alone, result):
                    raise Finding(f"thread {k} of {self.count} finds other numbers")


def functions(target, seed):
    """Return the functions of a case, without arguments: each gives a list of tensors, or the type of an error."""
    draw = Draw(seed, MODES[seed % len(MODES)])
    if target.startswith("ops."):
        call = ops.CALLS[TARGETS[target]](draw)

        def results():
            found, error = outcome_of(call)
            return type(error) if found is None else [*found[0], *found[1]]

        return [results]
    arguments, shape = modules.MODULES[TARGETS[target]]()
    if shape is None:
        return []
    torch.default_generator.manual_seed(seed)
    module = modules.class_of(TARGETS[target])(**arguments).eval()
    draw.dtype = torch.float32
    x = modules.samples(module, shape, draw)
    module(
        x
    )  # ActNorm takes its first numbers from data, once, which is no work for several threads
    module = copy.deepcopy(module)  # what is kept from call to call is not copied
    return [
        g
        for run in modules.directions_of(module, shape)
        for g in (lambda run=run: plain(run, x), lambda run=run: gradients(module, run, x))
    ]


def plain(run, x):
    with torch.no_grad():
        found = run(x)
    return [found] if isinstance(found, torch.Tensor) else list(found)


def gradients(module, run, x):
    """Return the gradients of the parameters and of samples: all threads read the parameters, none writes to them."""
    x = x.detach().requires_grad_()
    found = run(x)
    found = [found] if isinstance(found, torch.Tensor) else list(found)
    wanted = [t for t in found if t.requires_grad]
    if not wanted:
        return []
    leaves = [x, *module.parameters()]
    loss = sum(t.double().sum() for t in wanted)
    return [g for g in torch.autograd.grad(loss, leaves, allow_unused=True) if g is not None]


def same(a, b):
    if isinstance(a, type) or isinstance(b, type):
        return a is b
    return len(a) == len(b) and all(map(same_bits, a, b))
