"""The laws of an op's arguments: what is refused, and what dtypes may be mixed."""

import inspect
import itertools

import pytest
import torch
from torch.utils import _pytree as pytree

from laws.ops import FLOATS, results
from pyflowkern import use_reference

#: Of results that kernel and reference round once, from float32 at least; float64 ones may come of float32 arguments.
ONE_ROUNDING = {torch.bfloat16: 2**-7, torch.float16: 2**-10, torch.uint8: 0}
FLOAT32_SUMS = 2e-5


def flags_of(function):
    """Return the names of the arguments that are True or False."""
    parameters = inspect.signature(function).parameters.values()
    return [p.name for p in parameters if p.annotation in ("bool", bool)]


def outcome(function, sample):
    """Return the results, or the error as text."""
    try:
        return results(function(**sample.tensors, **sample.fixed))
    except (TypeError, ValueError) as error:
        return repr(error)


def check_arguments_are_named(case):
    """A wrong type, dtype, device, shape or option is refused by the argument's name, also in a list."""
    sample = max(case.small(torch.float32), key=lambda s: len(pytree.tree_leaves(s.tensors)))
    wrong_option = {str: "no such", bool: 2, int: "x", float: "x"}
    for name, value in {**sample.tensors, **sample.fixed}.items():
        if isinstance(value, torch.Tensor):
            for bad, error in _wrong_tensors(
                value, alone=name == next(iter(sample.tensors), name)
            ):
                _refuses(case, sample, name, bad, error)
        elif isinstance(value, list) and all(isinstance(t, torch.Tensor) for t in value):
            _refuses(case, sample, name, value[0], TypeError)
            _refuses(case, sample, name, value[:-1], ValueError)
            for bad, error in _wrong_tensors(value[0], alone=False):
                _refuses(case, sample, name, [bad, *value[1:]], error, rf"{name}\[0\]")
        elif value is not None:
            bad = wrong_option.get(type(value), object())
            _refuses(case, sample, name, bad, (TypeError, ValueError))


def _wrong_tensors(value, alone):
    """Yield what may not stand for a tensor, and its error; one of others (not ``alone``) must fit them."""
    for bad in (value.tolist(), "x", value.to(torch.complex64), value.to_sparse()):
        yield bad, TypeError
    if value.is_floating_point():
        yield value.int(), TypeError
    if not alone:
        yield value.to("meta"), ValueError
        if value.dim():
            larger = torch.cat((value, value), -1)
            yield torch.cat((larger, larger), 0), ValueError


def _refuses(case, sample, name, bad, error, match=None):
    device = isinstance(bad, torch.Tensor | list) and "meta" in {
        t.device.type for t in pytree.tree_leaves(bad) if isinstance(t, torch.Tensor)
    }
    with pytest.raises(error, match="device" if device else match or name):
        case.op(**{**sample.tensors, **sample.fixed, name: bad})


def check_other_dtypes_are_named(case):
    """A dtype that an op does not take is refused, by the name of an argument."""
    for dtype in {*FLOATS} - {*case.dtypes}:
        for sample in case.small(dtype):
            floats = [t for t in pytree.tree_leaves(sample.tensors) if isinstance(t, torch.Tensor)]
            if floats:
                with pytest.raises(TypeError, match=next(iter(sample.tensors))):
                    case.op(**sample.tensors, **sample.fixed)


def mixtures(count):
    """Return dtypes of ``count`` tensors: all, or some drawn at random."""
    if count <= 2:
        return list(itertools.product(FLOATS, repeat=count))
    generator = torch.Generator().manual_seed(count)
    drawn = torch.randint(len(FLOATS), (24, count), generator=generator).tolist()
    return [tuple(FLOATS[i] for i in row) for row in drawn]


def check_mixed_dtypes(case):
    """Kernel and reference take the same dtypes, mixed in any way, and give results of the same dtypes."""
    few = [*case.small(torch.float64)]
    for sample in (few[0], few[-1]):
        leaves, spec = pytree.tree_flatten((sample.tensors, sample.fixed))
        floats = [
            i
            for i, t in enumerate(leaves)
            if isinstance(t, torch.Tensor) and t.is_floating_point()
        ]
        for dtypes in mixtures(len(floats)):
            for i, dtype in zip(floats, dtypes, strict=True):
                leaves[i] = leaves[i].double().to(dtype)
            tensors, fixed = pytree.tree_unflatten(leaves, spec)
            mixed = type(sample)(tensors, **fixed)
            with use_reference():
                wanted = outcome(case.op, mixed)
            if isinstance(wanted, str):
                assert outcome(case.op, mixed) == wanted, str(mixed)
                continue
            for function in (case.op, case.reference):
                found = outcome(function, mixed)
                assert not isinstance(found, str), (found, str(mixed))
                assert [t.dtype for t in found] == [t.dtype for t in wanted], str(mixed)
                for a, b in zip(found, wanted, strict=True):
                    tolerance = ONE_ROUNDING.get(a.dtype, FLOAT32_SUMS)
                    torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance)
