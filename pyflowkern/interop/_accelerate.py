"""One line that makes a model of another library faster, in place."""

from __future__ import annotations

import torch

from pyflowkern.core.checks import check_flag
from pyflowkern.interop._doors import put, take_away
from pyflowkern.interop._kinds import kind_of, known_base
from pyflowkern.interop._report import Entry, Report

__all__ = ["accelerate", "restore"]


def accelerate(model: torch.nn.Module, *, strict: bool = False) -> Report:
    """Let ops of this package run the flows inside of a model of nflows, normflows, zuko or FrEIA, in place.

    Modules, parameters, ``state_dict`` keys, outputs, log-determinants, gradients and modes stay what they are: only
    methods of instances are replaced, by ones that read the same parameters at each call.  They go with copies and
    pickles of the model.  Each transform is compared with the library's own result once, here, on a few numbers in
    float64; where it differs, or is a subclass that may do anything, it is left alone.  The library also runs itself
    where something hangs on a part (hooks, parametrizations), under autocast, compilers and function transforms.

    Args:
        model: any module; what is known inside of it is accelerated.
        strict: raise where a part that was recognised had to be left alone.

    Returns:
        What was done with each part, and why others were left; ``print`` shows a table.

    Raises:
        TypeError: for a model that is no module.
        ValueError: with ``strict``, for parts that were left alone; the model is then as it was.

    Example:
        >>> import torch, pyflowkern
        >>> report = pyflowkern.accelerate(torch.nn.Linear(2, 2))  # nothing known
        >>> len(report.entries)
        0
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    check_flag("strict", strict)
    entries: list[Entry] = []
    for name, module in reversed([*model.named_modules()]):  # parts first
        if (entry := _equip(name, module)) is not None:
            entries.append(entry)
    report = Report(entries[::-1])
    if strict and report.left:
        restore(model)
        raise ValueError(
            f"strict=True, and parts of the model are left alone:\n{Report(report.left)}"
        )
    return report


def restore(model: torch.nn.Module) -> None:
    """Undo :func:`accelerate`: give all modules of a model their own methods back.

    Args:
        model: any module.

    Raises:
        TypeError: for a model that is no module.

    Example:
        >>> import torch, pyflowkern
        >>> pyflowkern.restore(torch.nn.Linear(2, 2))
    """
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    for module in model.modules():
        take_away(module)


def _equip(name: str, module: torch.nn.Module) -> Entry | None:
    """Put doors on one module; return what is to be said of it."""
    found = kind_of(type(module))
    if found is None:
        base = known_base(type(module))
        kind = f"{type(module).__module__}.{type(module).__name__}"
        return Entry(name, kind, note=f"a subclass of {base} may do anything") if base else None
    known, label = found
    take_away(module)  # of an earlier call
    if any(method in module.__dict__ for method in known.methods):
        return Entry(name, label, note="a method was replaced for this instance")
    outcome = known.look(module)
    for door in outcome.doors:
        put(door)
    if not outcome.doors and known.quiet:
        return None
    return Entry(name, label, outcome.runs if outcome.doors else "", outcome.gain, outcome.note)
