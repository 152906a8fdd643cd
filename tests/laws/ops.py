"""The laws of ops: a family says what its ops are (tests/cases), ``tests/ops/test_laws.py`` holds them to each law."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Mapping

import torch
from torch.utils import _pytree as pytree

from laws.draws import normal

FLOATS = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
STATES = (torch.float32, torch.float64)


@dataclasses.dataclass
class Sample:
    """Arguments of an op by name: those that are differentiated, and the rest; and what plain PyTorch made of them."""

    tensors: dict
    fixed: dict

    def __init__(self, tensors, **fixed):
        self.tensors, self.fixed, self.known = dict(tensors), fixed, {}

    def map(self, change):
        """Return the sample with every tensor changed."""
        return Sample(
            *pytree.tree_map_only(torch.Tensor, change, (self.tensors,)), **self._map_fixed(change)
        )

    def _map_fixed(self, change):
        return {
            key: pytree.tree_map_only(torch.Tensor, change, value)
            for key, value in self.fixed.items()
        }

    def double(self):
        return self.map(lambda t: t.double() if t.is_floating_point() else t)

    def moved(self, eps, draw=0):
        """Return the sample with every differentiated number off by one rounding, up or down."""

        def move(t):
            if not t.is_floating_point():
                return t
            return t * (1 + eps * normal(*t.shape, seed=t.numel() + draw).sign().to(t))

        moved = pytree.tree_map_only(torch.Tensor, move, self.tensors)
        return Sample(moved, **self.fixed)

    def __str__(self):
        def show(t):
            if isinstance(t, torch.Tensor):
                return f"{str(t.dtype).removeprefix('torch.')}{list(t.shape)}"
            return [show(v) for v in t] if isinstance(t, list | tuple) else str(t)

        return ", ".join(f"{k}={show(v)}" for k, v in {**self.tensors, **self.fixed}.items())


@dataclasses.dataclass(frozen=True)
class Batch:
    """Where a tensor has its ``n`` samples: once on an axis, or ``copies`` times, of as many batches end to end."""

    n: int
    copies: int = 1

    def view(self, t, axis=0):
        """Return the tensor with its samples first, none if it has none."""
        if t.dim() <= axis or t.shape[axis] not in (self.n, self.copies * self.n):
            return None
        if t.shape[axis] != self.n:
            return t.unflatten(axis, (self.copies, self.n)).movedim(axis + 1, 0)
        return t.movedim(axis, 0)

    def part(self, t, index, axis=0):
        """Return the tensor of some of the samples."""
        found = self.view(t, axis)
        if found is None:
            return t
        if t.shape[axis] != self.n:
            return found[index].movedim(0, axis + 1).flatten(axis, axis + 1)
        return found[index].movedim(0, axis)


DRAWN: dict[tuple, list[Sample]] = {}


@dataclasses.dataclass(frozen=True)
class OpCase:
    """What the laws need to know of an op.

    Attributes:
        op: the function; all arguments by name.
        reference: the same in plain PyTorch.
        samples: few but awkward arguments of a dtype, for the law of errors.
        small: some with every option, of a few numbers, for all other laws.
        floor: how many roundings of the largest entry an error may exceed twice plain PyTorch's.
        reason: why so many.
        large: arguments of float32 that several threads share; none where threads have no part.
        rows: the arguments that hold a sample a row, also in lists, and on which axis; the first one does, or none.
        whole: why there are no samples, where there are none.
        copies: of a sample of arguments, how many batches stand end to end on the first axis.
        placed: why a result depends on the place of its sample in the batch, where it does.
        dtypes: those it takes.
        log_det: whether the second result is the log-determinant of the first's Jacobian by the first argument.
        conditioned: how many draws of arguments off by a rounding count as plain PyTorch's error, where that matters.
        reentrant: whether the gradient that comes in is left as it is.
        torch_sums: arguments whose gradients are products of torch's, which it may sum otherwise with other threads.
        shares: whether samples of a batch may be rounded otherwise than alone, and why.
        by_reference: whether kernels of GPUs leave a sample of arguments to plain PyTorch.
        spreads: whether the first row of an argument may stand for all its rows.
    """

    op: Callable
    reference: Callable
    samples: Callable[[torch.dtype], Iterable[Sample]]
    small: Callable[[torch.dtype], Iterable[Sample]]
    floor: float
    reason: str
    large: Callable[[], Iterable[Sample]] | None = None
    rows: Mapping[str, int] = dataclasses.field(default_factory=lambda: {"x": 0})
    dtypes: tuple[torch.dtype, ...] = FLOATS
    log_det: bool = False
    whole: str = ""
    copies: Callable[[Sample], int] = lambda sample: 1
    placed: str = ""
    shares: str = ""
    by_reference: Callable[[Sample], bool] = lambda sample: False
    spreads: bool = True
    conditioned: int = 0
    reentrant: bool = True
    torch_sums: tuple[str, ...] = ()
    name: str = ""

    def __post_init__(self):
        assert bool(self.rows) != bool(self.whole), "name the rows, or say why there are none"

    def __str__(self):
        return self.name or self.op.__name__

    def drawn(self, which, dtype):
        """Return the arguments of "samples" or "small", the same for every backend: plain PyTorch runs on them once."""
        key = str(self), which, dtype, torch.get_default_device()
        if key not in DRAWN:
            DRAWN[key] = [*getattr(self, which)(dtype)]
        return DRAWN[key]

    def batch(self, sample):
        """Return where tensors have their samples, none if this sample of arguments has none."""
        name, axis = next(iter(self.rows.items()), ("", 0))
        first = {**sample.tensors, **sample.fixed}.get(name)
        if not isinstance(first, torch.Tensor) or first.dim() <= axis:
            return None
        copies = self.copies(sample)
        return Batch(first.shape[axis] // copies, copies)

    def part(self, sample, index):
        """Return the arguments of some of the batch."""
        batch = self.batch(sample)

        def of(arguments):
            return {
                key: pytree.tree_map_only(
                    torch.Tensor, lambda t, a=self.rows[key]: batch.part(t, index, a), value
                )
                if key in self.rows
                else value
                for key, value in arguments.items()
            }

        return Sample(of(sample.tensors), **of(sample.fixed))


def results(found):
    """Return the tensors of what an op returns, in a list."""
    return [t for t in pytree.tree_leaves(found) if isinstance(t, torch.Tensor)]


def run(function, sample, layout=None, cotangents=None, around=contextlib.nullcontext):
    """Return results and the gradients of all tensors, for cotangents that are drawn unless given.

    ``layout`` changes each tensor and cotangent to one of the same values, ``around`` is about the call.
    """
    leaves, spec = pytree.tree_flatten(sample.tensors)
    leaves = [
        t.detach().clone(memory_format=torch.preserve_format).requires_grad_(t.is_floating_point())
        if isinstance(t, torch.Tensor)
        else t
        for t in leaves
    ]
    seen = leaves
    fixed = sample.fixed
    if layout is not None:
        seen = [layout(t) if isinstance(t, torch.Tensor) else t for t in leaves]
        fixed = sample._map_fixed(layout)
    with around():
        found = results(function(**pytree.tree_unflatten(seen, spec), **fixed))
    smooth = [(i, t) for i, t in enumerate(found) if t.requires_grad]
    if cotangents is None:
        cotangents = {i: normal(*t.shape, seed=7 + i).to(t.dtype) for i, t in smooth}
    wanted = [t for t in leaves if isinstance(t, torch.Tensor) and t.requires_grad]
    gradients = [torch.zeros_like(t) for t in wanted]
    if smooth and wanted:
        gradients = torch.autograd.grad(
            [t for _, t in smooth],
            wanted,
            [  # some ops write over theirs
                (layout or torch.Tensor.contiguous)(cotangents[i].to(t.dtype, copy=True))
                for i, t in smooth
            ],
            allow_unused=True,
            materialize_grads=True,
        )
    return [t.detach() for t in (*found, *gradients)], len(found), cotangents


def hold(op, reference, sample, floor=4.0, layout=None, conditioned=0):
    """Hold values and gradients to the error law, against the reference in float64.

    The error is at most twice that of plain PyTorch at the same dtype, and ``floor`` roundings of the largest entry
    more, since an error of plain PyTorch may happen to be zero.  In float64 that error is always zero; there the
    reference is held against itself with its arguments off by a rounding, which no sum in another order need undercut.
    Half inputs count their gradients' storage rounding in both.  Where one rounding of an argument may do more harm
    than those of plain PyTorch happen to do, as in a narrow bin or an ill-conditioned matrix, ``conditioned`` draws of
    such arguments count as well.
    """
    ours, count, cotangents = run(op, sample, layout)
    # the draws only allow more, and are seldom needed
    for draws in dict.fromkeys((0, conditioned)):
        key = *cotangents, draws
        if key not in sample.known:
            sample.known[key] = _by_plain_pytorch(reference, sample, cotangents, draws)
        try:
            _compare(sample, ours, count, sample.known[key], floor)
        except AssertionError:
            if draws == conditioned:
                raise
        else:
            return


def _compare(sample, ours, count, known, floor):
    """Hold results to what is known of plain PyTorch's."""
    plain, exact, dtypes = known
    given = [
        t
        for t in pytree.tree_leaves((sample.tensors, sample.fixed))
        if isinstance(t, torch.Tensor)
    ]
    double = _is_double(sample)
    if not double:
        assert [t.dtype for t in ours] == dtypes
    most = max([t.numel() for t in (*ours[:count], *given)])
    for i, (a, b, c) in enumerate(zip(ours, plain, exact, strict=True)):
        assert a.shape == c.shape, f"result {i} has shape {a.shape}, not {c.shape} ({sample})"
        if a.numel() == 0:
            continue
        if not a.is_floating_point():
            assert torch.equal(a, b), f"result {i} ({sample})"
            continue
        finite = c.isfinite()
        assert torch.equal(a.isfinite(), finite), f"result {i} ({sample})"
        if not finite.any():
            continue
        eps = torch.finfo(a.dtype).eps
        if a.dtype == torch.float64 and not double:  # a sum of float32 terms
            eps = 2.0**-23
        size = _size(c[finite], a, most)
        allowed = 2 * _largest((b.double() - c)[finite]) + floor * eps * size
        worst = _largest((a.double() - c)[finite])
        assert worst <= allowed, (
            f"result {i}: error {worst:.3g}, allowed {allowed:.3g}; that is "
            f"{(worst - allowed) / (eps * size or 1):.3g} roundings more ({sample})"
        )


def _is_double(sample):
    floats = [t for t in results((sample.tensors, sample.fixed)) if t.is_floating_point()]
    return all(t.dtype == torch.float64 for t in floats)


def _by_plain_pytorch(reference, sample, cotangents, conditioned):
    """Return its results at the dtype of the sample, with the largest errors that count; those in float64; dtypes."""
    wide, double = sample.double(), _is_double(sample)
    exact, _, _ = run(reference, wide, cotangents=cotangents)
    if double:
        moved = Sample(cotangents).moved(2.0**-52).tensors
        plain, _, _ = run(reference, wide.moved(2.0**-52), cotangents=moved)
    else:
        plain, _, _ = run(reference, sample, cotangents=cotangents)
    dtypes = [t.dtype for t in plain]
    eps = 2.0**-52 if double else 2.0**-23  # half is computed in float32
    for draw in range(conditioned):
        moved, _, _ = run(reference, wide.moved(eps, 100 + draw), cotangents=cotangents)
        for i, c in enumerate(exact):
            plain[i] = max(plain[i], moved[i], key=lambda t, c=c: _largest(t.double() - c))
    return plain, exact, dtypes


def _largest(t):
    return float(t.abs().max()) if t.numel() else 0.0


def _size(exact, found, most):
    """Return the largest entry; of sums, whose terms may cancel, at least that of as many terms of order one."""
    return max(_largest(exact), (most / found.numel()) ** 0.5 if found.numel() < most else 0.0)


def law(op, reference, inputs, floor=4.0, **options):
    """Hold ``op(*inputs)`` to the error law."""
    names = [f"input {i}" for i in range(len(inputs))]
    sample = Sample(zip(names, inputs, strict=True))

    def by_place(function):
        return lambda **given: function(*given.values(), **options)

    hold(by_place(op), by_place(reference), sample, floor)
