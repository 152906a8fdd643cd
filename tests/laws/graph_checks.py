"""The laws of registered ops in graphs: what compilers are told of them, and what they make of it."""

import torch
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from laws.op_checks import of_leaves
from laws.ops import run

#: Of float32 results and gradients, in whose sums a compiler changes the order and fuses operations; the absolute bound
#: is for sums that cancel.
COMPILED_RTOL, COMPILED_ATOL = 1e-4, 1e-5


class Recorded(TorchDispatchMode):
    """The ops of this package that run inside, with a copy of their arguments."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == "pyflowkern":
            copy = pytree.tree_map_only(torch.Tensor, lambda t: t.detach().clone(), args)
        found = func(*args, **kwargs or {})
        if func.namespace == "pyflowkern":
            key = (str(func), str(pytree.tree_map(_kind, (args, found))))
            self.calls.setdefault(key, (func, copy))
        return found


def _kind(value):
    """Return what may matter to a schema: not sizes and numbers."""
    if isinstance(value, torch.Tensor):
        return value.dtype, value.dim(), value.is_contiguous()
    return type(value)


def recorded(case, dtype=torch.float32):
    """Return the calls of registered ops that a case comes to, one of each kind."""
    with Recorded() as seen:
        for sample in case.small(dtype):
            run(case.op, sample)
    return list(seen.calls.values())


def check_no_dtype_is_read_as_another(case):
    """An exported program that was cast calls ops without Python's checks: in half types, of half the size.

    Kernels of longer numbers refuse them, since they would read beyond the end.
    """
    for func, args in recorded(case):
        if not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "CPU"):
            continue  # torch's own ops

        def cast(dtype, given=args):
            return pytree.tree_map_only(
                torch.Tensor,
                lambda t: t.to(dtype) if t.dtype == torch.float32 else t.clone(),
                given,
            )

        half = cast(torch.bfloat16)
        with torch.no_grad():
            try:
                found = pytree.tree_leaves(func(*half))
            except (RuntimeError, NotImplementedError):
                continue
            rounded = pytree.tree_map_only(
                torch.Tensor,
                lambda t: t.float() if t.dtype == torch.bfloat16 else t,
                cast(torch.bfloat16),
            )
            wanted = pytree.tree_leaves(func(*rounded))
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a.double(), b.double(), rtol=0.1, atol=0.1, equal_nan=True)


def check_every_number_is_written(case):
    """No result holds what was in memory before, not even what only a backward pass reads.

    The backends of kernels fill fresh memory with NaN.
    """
    for func, args in recorded(case):
        found = pytree.tree_leaves(func(*args))
        for i, t in enumerate(found):
            if isinstance(t, torch.Tensor) and t.is_floating_point():
                assert not t.isnan().any(), f"result {i} of {func.name()}"


#: What ``torch.library.opcheck`` looks at; the last traces a graph of symbolic shapes, which takes most of the time.
REGISTERED = ("test_schema", "test_autograd_registration", "test_faketensor")
TRACED = "test_aot_dispatch_dynamic"


def check_registration(case):
    """``torch.library.opcheck`` of every op that runs, with gradients where it has a formula.

    Of other dtypes only the shapes, strides and dtypes that a compiler is told can be wrong.
    """
    traced = set()
    for func, args in recorded(case):
        if torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), "Autograd"):
            args = pytree.tree_map_only(
                torch.Tensor, lambda t: t.requires_grad_(t.is_floating_point()), args
            )
        kind = func, sum(isinstance(t, torch.Tensor) for t in pytree.tree_leaves(args))
        more = () if kind in traced else (TRACED,)  # one graph for each op and number of tensors
        torch.library.opcheck(func, args, test_utils=(*REGISTERED, *more))
        traced.add(kind)
    for dtype in {torch.bfloat16, torch.float64} & {*case.dtypes}:
        for func, args in recorded(case, dtype):
            torch.library.opcheck(func, args, test_utils="test_faketensor")


#: Inductor without kernels of its own: it lays out memory, reuses it and compares the strides of every result with what
#: it was told, as ever, but calls torch for the rest in place of writing C++, whose compilation takes most of the time.
#: Nothing may come from its cache, which does not see that an op now tells something else.
STRIDES = {"fallback_by_default": True, "fx_graph_cache": False}


def check_compiles(case, compiler, which, options=None):
    """Into one graph, which has the same values and gradients, for ``which`` of the small samples."""
    samples = [*case.small(torch.float32)]
    for sample in samples[which] or samples:
        function, leaves = of_leaves(case.op, sample)

        def loss(*given, function=function):
            found = function(*given)
            return sum((t.cos() * t).sum() for t in found), found

        compiled = torch.compile(loss, fullgraph=True, backend=compiler, options=options)
        for f in (loss, compiled):
            total, values = f(*leaves)
            found = [*values]
            if isinstance(total, torch.Tensor) and total.requires_grad:
                options = {"allow_unused": True, "materialize_grads": True}
                found += torch.autograd.grad(total, leaves, **options)
            if f is loss:
                expected = found
        for a, b in zip(found, expected, strict=True):
            torch.testing.assert_close(
                a, b, rtol=COMPILED_RTOL, atol=COMPILED_ATOL, equal_nan=True
            )
