"""Solves with fixed steps as CUDA graphs: recorded once, and replayed by a single call instead of one per kernel."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from pyflowkern.ode.packing import Packing
from pyflowkern.ode.solution import Solution, Status
from pyflowkern.ode.solve import solve
from pyflowkern.ode.tableaus import Tableau, tableau
from pyflowkern.ode.times import number

__all__ = ["CapturedSolve", "capture"]

#: Solves before the recording, so that libraries allocate their workspaces outside of it.
_WARM_UP = 2


class CapturedSolve:
    """A solve with fixed steps that :func:`capture` recorded; call it with a first state.

    Args:
        inputs: tensors of the first state, which the recorded kernels read.
        solution: tensors that they write.
        packing: of the first state.
        replay: runs the kernels.
        reads: further tensors that they read, such as parameters.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> if torch.cuda.is_available():
        ...     y0 = torch.ones(3, device="cuda")
        ...     grow = ode.capture(lambda t, y: y, y0, [0.0, 1.0], step_size=0.1)
        ...     assert isinstance(grow, ode.CapturedSolve) and grow(y0).ys.shape == (2, 3)
    """

    def __init__(
        self,
        inputs: tuple[Tensor, ...],
        solution: Solution,
        packing: Packing,
        replay: Callable[[], None],
        reads: Iterable[Tensor] = (),
    ) -> None:
        self._inputs, self._solution = inputs, solution
        self._packing, self._replay = packing, replay
        # the detached alias keeps the memory alive that the kernels read, even if the tensor gets other memory
        self._reads = [(t, t.detach(), t.data_ptr()) for t in reads]

    @torch.no_grad()
    def __call__(self, y0: Any) -> Solution:
        """Solve from another first state of the same structure, shapes, dtypes and device.

        Args:
            y0: tensor or tuple of tensors, like the one given to :func:`capture`.

        Returns:
            A :class:`Solution` that later calls do not overwrite, without gradients; its ``status`` is a 0-d tensor on
            the device.

        Raises:
            TypeError: for another structure.
            ValueError: for another shape, dtype or device.
            RuntimeError: when a tensor that ``func`` has read has other memory than at the recording, as after
                ``p.data = new`` or ``module.to(...)``: record the solve again.
        """
        if any(t.data_ptr() != place for t, _, place in self._reads):
            raise RuntimeError(
                "a tensor that func reads, such as a parameter, has other memory than when the solve was captured: "
                "capture it again, and between calls change tensors in place only"
            )
        entries = _entries(y0)
        if isinstance(y0, tuple) != self._packing.is_tuple or len(entries) != len(self._inputs):
            want = f"a tuple of {len(self._inputs)}" if self._packing.is_tuple else "a tensor"
            raise TypeError(f"y0 must be {want}, as it was captured, got {type(y0).__name__}")
        for new, old in zip(entries, self._inputs, strict=True):
            _check_like(new, old)
        for new, old in zip(entries, self._inputs, strict=True):
            old.copy_(new)
        self._replay()
        s = self._solution
        ys = tuple(y.clone() for y in s.ys) if isinstance(s.ys, tuple) else s.ys.clone()
        status = s.status.clone() if isinstance(s.status, Tensor) else s.status
        return Solution(ys, s.ts, status, s.stats)


def capture(
    func: Callable[..., Any],
    y0: Any,
    t: Tensor | Sequence[float],
    *,
    method: str | Tableau = "rk4",
    step_size: float | None = None,
    max_steps: int = 10_000,
    compat: str | None = None,
) -> CapturedSolve:
    """Record a solve with fixed steps as a CUDA graph.

    For small states, launching the kernels costs more than running them; a replay launches all of them at once.  Times,
    steps and whatever ``func`` does in Python are fixed at the recording.  The values of tensors that it reads, such as
    parameters, are not: update them in place.  Where such a tensor is given other memory (``p.data = new``) the next
    call raises; where another tensor is put in its place (``module.weight = new``) the old one is still read, unseen,
    until the solve is captured again.  ``func`` must not wait for the device, and there are no gradients.

    Args:
        func: ``(t, y) -> dy/dt``, of CUDA tensors.
        y0: a first state on a CUDA device: a tensor or a tuple of tensors.
        t: times of the output, monotone, two or more.
        method: as in :func:`solve`; a method with step control needs ``step_size``.
        step_size: as in :func:`solve`.
        max_steps: as in :func:`solve`, but a solve that needs more is an error.
        compat: as in :func:`solve`.

    Returns:
        A :class:`CapturedSolve`, to be called with first states.

    Raises:
        TypeError: for a state that is not floating-point or a wrong result of ``func``.
        ValueError: for a method that would choose its steps, for more than ``max_steps`` steps, for tensors that are
            not on a CUDA device or require a gradient; and as in :func:`solve`.

    Example:
        >>> import torch
        >>> from pyflowkern import ode
        >>> if torch.cuda.is_available():
        ...     y0 = torch.ones(3, device="cuda")
        ...     decay = ode.capture(lambda t, y: -y, y0, [0.0, 1.0], step_size=0.1)
        ...     assert torch.allclose(decay(2 * y0).ys[-1], 2 * torch.exp(-y0), rtol=1e-5)
    """
    if not callable(func):
        raise TypeError(f"func must be callable, got {type(func).__name__}")
    packing = Packing(y0, False)
    if tableau(method).error is not None and step_size is None:
        raise ValueError(f"method {method!r} chooses its steps: a captured solve needs step_size")
    times = t.detach().tolist() if isinstance(t, Tensor) else [number(v) for v in t]
    entries = _entries(y0)
    if any(e.requires_grad for e in entries):
        raise ValueError("y0 must not require a gradient, none passes a captured solve: detach it")
    _check_device(entries[0])
    inputs = tuple(e.detach().clone() for e in entries)
    state = inputs if packing.is_tuple else inputs[0]

    def run() -> Solution:
        return solve(
            func, state, times, method=method, step_size=step_size, max_steps=max_steps,
            compat=compat,
        )  # fmt: skip

    def first() -> None:
        if run().status == Status.max_steps:
            raise ValueError(f"max_steps must allow for all steps, got {max_steps}")

    with torch.no_grad():
        with _Reads() as reads:
            first()
        replay, solution = _record(first, run, inputs[0].device)
    return CapturedSolve(inputs, solution, packing, replay, reads.tensors.values())


class _Reads(TorchDispatchMode):
    """Collects the tensors that operations of torch read and that no operation has created."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.tensors: dict[int, Tensor] = {}
        self._made: set[int] = set()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        for t in tree_leaves((args, kwargs)):
            if isinstance(t, Tensor) and t.layout == torch.strided and id(t) not in self._made:
                self.tensors[id(t)] = t
        out = func(*args, **kwargs)
        self._made.update(id(t) for t in tree_leaves(out) if isinstance(t, Tensor))
        return out


def _record(
    first: Callable[[], None], run: Callable[[], Solution], device: torch.device
) -> tuple[Callable[[], None], Solution]:
    """Record ``run`` after calls of ``first``; return what replays it, and the tensors that it writes."""
    with torch.cuda.device(device):
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_WARM_UP):
                first()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            solution = run()
    return graph.replay, solution


def _entries(state: Any) -> tuple[Any, ...]:
    return state if isinstance(state, tuple) else (state,)


def _check_device(y: Tensor) -> None:
    if not y.is_cuda:
        raise ValueError(
            f"y0 must be on a CUDA device, got {y.device}: nothing else records a graph"
        )


def _check_like(new: Any, old: Tensor) -> None:
    if not isinstance(new, Tensor):
        raise TypeError(f"y0 must be a tensor or a tuple of tensors, got {type(new).__name__}")
    for name, want, got in (
        ("shape", tuple(old.shape), tuple(new.shape)),
        ("dtype", old.dtype, new.dtype),
        ("device", old.device, new.device),
    ):
        if want != got:
            raise ValueError(f"y0 must have the captured {name}, {want}, got {got}")
