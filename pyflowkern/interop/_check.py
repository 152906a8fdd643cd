"""Whether what runs in the place of a library's transform gives what the library gives."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from functools import partial
from types import BuiltinFunctionType, FunctionType

import torch
from torch import Tensor

from pyflowkern.interop._doors import take_away, the_library_itself
from pyflowkern.interop._layers import ForeignLayer
from pyflowkern.nn.chain import Run
from pyflowkern.nn.links import Door, obstructed

__all__ = ["comparable", "disagreement", "own_disagreement", "same_values"]

_SAMPLES = 7
#: Of float64 (float32 where softplus is torch's, which leaves out 2e-9): both sides round otherwise, and no more.
_TOLERANCE = {torch.float64: 1e-7, torch.float32: 1e-3}


def disagreement(module: torch.nn.Module, make: Callable[[torch.nn.Module], ForeignLayer]) -> str:
    """Return why a chain must not stand for a transform, found by running both on a few numbers; empty if it may.

    Versions of a library differ, and what a class is named says little: so transforms are compared, as copies in
    float64 in evaluation mode, on the CPU; those of the same classes and the same steps once.
    """
    form = _form(module, make)
    if form is not None and form in _agreed:
        return ""
    try:
        twin = comparable(_copied(module))
    except Exception as error:
        return f"it cannot be copied to be compared: {type(error).__name__}"
    why = _differs(make(twin), twin)
    if not why and form is not None:
        if len(_agreed) >= _MOST_FORMS:
            _agreed.clear()
        _agreed.add(form)
    return why


def _copied(module: torch.nn.Module) -> torch.nn.Module:
    """Return a copy without the matrices that nflows keeps in evaluation, which are of other parameters than its own.

    They may be results of recorded operations, which cannot be copied.
    """
    caches = [
        vars(cache) for m in module.modules() if hasattr(cache := vars(m).get("cache"), "__dict__")
    ]
    kept = [value for cache in caches for value in cache.values() if isinstance(value, Tensor)]
    return copy.deepcopy(module, {id(value): None for value in kept})


#: Forms of transforms that agreed with the library.
_agreed: set[object] = set()
_MOST_FORMS = 1000
_PLAIN = (int, float, str, type(None), type, FunctionType, BuiltinFunctionType)


def _form(module: torch.nn.Module, make: Callable[[torch.nn.Module], ForeignLayer]) -> object:
    """Return all that a transform computes by, but for its tensors; None where it must be compared itself."""
    link = make(module)._chain_link()
    if link is None or obstructed(link):
        return None
    if any(_is_own(value) for part in module.modules() for value in part.__dict__.values()):
        return None
    parts = [(type(part), *_settings(part)) for part in module.modules()]
    names = tuple(name for _, _, name in link.sources)
    return tuple(parts), names, tuple(link.steps), link.context_features, link.bounded


def _is_own(value: object) -> bool:
    """Whether an attribute may compute anything, or holds its module: methods of instances, closures."""
    if isinstance(value, partial):
        return _is_own(value.func)
    if isinstance(value, FunctionType):
        return value.__closure__ is not None
    return callable(value) and not isinstance(value, (*_PLAIN, torch.nn.Module, Door))


def _settings(part: torch.nn.Module) -> Iterator[object]:
    """Yield the attributes of a module that are numbers, texts, classes and functions, or lists of such."""
    for key, value in part.__dict__.items():
        if isinstance(value, _PLAIN) and key != "training":
            yield key, value
        elif isinstance(value, partial):
            yield key, value.func, repr(value.args), repr(value.keywords)
        elif isinstance(value, (list, tuple)):
            yield key, repr(value)


def _differs(layer: ForeignLayer, twin: torch.nn.Module) -> str:
    link, dtype = layer._chain_link(), torch.float64
    if link is None:
        return "its form or a part of it is not known"
    draw = torch.Generator().manual_seed(0)
    if any(waits() for waits in link.waits):  # for the first batch
        try:
            with torch.no_grad(), the_library_itself():
                layer(torch.randn(_SAMPLES, layer.features, generator=draw, dtype=dtype))
        except Exception as error:
            return f"the library itself fails on a few numbers: {type(error).__name__}: {error}"
    if obstructed(link):
        return "hooks or methods of its own hang on it"
    if not link.in_float64:
        twin.float()
        link, dtype = layer._chain_link(), torch.float32
        if link is None:
            return "its form or a part of it is not known"
    x = _numbers(link.bounded, (_SAMPLES, layer.features), draw, dtype)
    context = None
    if link.context_features:
        context = torch.randn(_SAMPLES, link.context_features, generator=draw, dtype=dtype)
    run = Run([layer], link, layer.features)
    with torch.no_grad(), the_library_itself():
        try:
            want = layer(x, context)
        except Exception as error:
            return f"the library itself fails on a few numbers: {type(error).__name__}: {error}"
        got = run.fused(x, context)
    if got is None:
        return "no kernel runs it here"
    return (
        "" if same_values(got, want) else "its values are not those of the form that its name says"
    )


def _numbers(
    bounded: bool, shape: tuple[int, ...], draw: torch.Generator, dtype: torch.dtype
) -> Tensor:
    """Return inputs of a transform: in [0, 1] for one that takes no others."""
    make = torch.rand if bounded else torch.randn
    return (1.0 if bounded else 1.5) * make(shape, generator=draw, dtype=dtype)


def own_disagreement(
    module: torch.nn.Module, make: Callable[[torch.nn.Module], ForeignLayer]
) -> str:
    """Return why ops must not stand for a transform around its network, which is called; empty if they may.

    Both directions are compared, on vectors or, where the library does not take these, on images of 4x4 pixels.
    """
    try:
        twin = comparable(_copied(module))
    except Exception as error:
        return f"it cannot be copied to be compared: {type(error).__name__}"
    layer, why = make(twin), ""
    for space in ((), (4, 4)):
        for bounded in (False, True):
            why = _own_differs(layer, twin, bounded, space)
            if not why or not why.startswith(_FAILS):
                return why
    return why


_FAILS = "the library itself fails"


def _own_differs(
    layer: ForeignLayer, twin: torch.nn.Module, bounded: bool, space: tuple[int, ...]
) -> str:
    draw, dtype = torch.Generator().manual_seed(0), torch.float64
    x = _numbers(bounded, (_SAMPLES, layer.features, *space), draw, dtype)
    sizes = [
        size
        for part in twin.modules()
        for name in ("context_features", "context_channels")
        if isinstance(size := getattr(part, name, None), int)
    ]
    context = None
    if sizes:
        context = torch.randn(_SAMPLES, sizes[0], *space, generator=draw, dtype=dtype)
    for inverse in (False, True):
        with torch.no_grad(), the_library_itself():
            try:
                want = layer.inverse(x, context) if inverse else layer(x, context)
            except Exception as error:
                return f"{_FAILS} on a few numbers: {type(error).__name__}: {error}"
            got = layer.by_op(x, context, inverse)
        if got is None:
            return "its form is not known"
        if not same_values(got, want):
            return "its values are not those of the form that its name says"
        x = want[0]
    return ""


def comparable(twin: torch.nn.Module) -> torch.nn.Module:
    """Bring a copy of a transform to the CPU, float64 and evaluation mode, and move its parameters.

    Those of a fresh model are mostly those of the identity, which says little.
    """
    for part in twin.modules():
        take_away(part)
    twin = twin.cpu().double().eval()
    draw = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for p in twin.parameters():
            if p.is_floating_point():
                p.add_(torch.randn(p.shape, generator=draw, dtype=p.dtype), alpha=0.1)
    return twin


def same_values(got: tuple[Tensor, ...], want: tuple[Tensor, ...]) -> bool:
    """Whether tensors agree to rounding."""
    return all(
        a.shape == b.shape
        and torch.allclose(
            a.to(b.dtype), b, rtol=(t := _TOLERANCE[a.dtype]), atol=t, equal_nan=True
        )
        for a, b in zip(got, want, strict=True)
    )
