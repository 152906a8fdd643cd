"""One line that makes a model of another library faster, in place."""

from __future__ import annotations

import threading
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch

from pyflowkern.core.checks import check_flag
from pyflowkern.interop._classes import patch_classes, restore_classes
from pyflowkern.interop._defects import known_defect
from pyflowkern.interop._doors import ReplicaDoor, put, take_away
from pyflowkern.interop._gains import expected_gain
from pyflowkern.interop._kinds import Kind, Outcome, kind_of, known_base, label_of_unknown
from pyflowkern.interop._patches import patch_functions, restore_functions
from pyflowkern.interop._report import Entry, Report

__all__ = ["accelerate", "restore"]


class _Hold:
    """One call of ``accelerate()`` without a model that was not undone."""

    def __init__(self) -> None:
        #: Of its report.
        self.entries: list[Entry] = []


_lock = threading.RLock()
_holds: list[_Hold] = []


def accelerate(model: torch.nn.Module | None = None, *, strict: bool = False) -> Report:
    """Let ops of this package run the flows inside of a model of nflows, normflows, zuko or FrEIA, in place.

    Modules, parameters, ``state_dict`` keys, outputs, log-determinants, gradients and modes stay what they are: only
    methods of instances are replaced, by ones that read the same parameters at each call.  They go with copies and
    pickles of the model.  Each transform is compared with the library's own result once, here, on a few numbers in
    float64; where it differs, or is a subclass that may do anything, it is left alone.  The library also runs itself
    where something hangs on a part (hooks, parametrizations), under autocast, compilers and function transforms.

    Without a model, the classes of the libraries that are installed are patched for this process, so that models which
    other code builds are accelerated at their first call.  Libraries are imported for that.  What a copy got meanwhile,
    it keeps until it is restored itself.  Their functions for splines, and those of torchdiffeq, are replaced by
    :mod:`pyflowkern.interop.nflows`, :mod:`~pyflowkern.interop.normflows` and :mod:`~pyflowkern.interop.torchdiffeq`,
    under every global name that a module holds them by; attributes, default arguments and closures keep them.  A
    ``with`` block undoes all that unless another one, or a call before it, still wants it.

    Args:
        model: any module; what is known inside of it is accelerated.  None for all models of this process.
        strict: raise where a transform or a density of one of the libraries had to be left alone, also one that no op
            knows.

    Returns:
        What was done with each part, and why others were left; ``print`` shows a table.  Without a model it first lists
        the libraries, and then, once each, what is left alone of the models that are met.  It is a context manager,
        too, at whose end all is undone.

    Raises:
        TypeError: for a model that is no module.
        ValueError: with ``strict``, for parts that were left alone; the model is then as it was.  Also for ``strict``
            without a model.

    Example:
        >>> import torch, pyflowkern
        >>> report = pyflowkern.accelerate(torch.nn.Linear(2, 2))  # nothing known
        >>> len(report.entries)
        0
    """
    check_flag("strict", strict)
    if model is None:
        if strict:
            raise ValueError(
                "strict=True needs a model: which ones the process will build is not known yet"
            )
        hold = _Hold()
        with _lock:
            classes, functions = patch_classes(_equip_noted), patch_functions()
            hold.entries += [Entry("", name, "one op") for name in classes]
            hold.entries += [Entry("", name, "own op", note="functions") for name in functions]
            _holds.append(hold)
        return Report(hold.entries, undo=partial(_release, hold))
    _check(model)
    report = Report(_equip_all(model), undo=partial(restore, model))
    if strict and report.left:
        restore(model)
        raise ValueError(
            f"strict=True, and parts of the model are left alone:\n{Report(report.left)}"
        )
    return report


def restore(model: torch.nn.Module | None = None) -> None:
    """Undo :func:`accelerate`: give all modules of a model, or all that was patched, their own methods back.

    Args:
        model: any module; None undoes ``accelerate()`` without a model, however often it was called.

    Raises:
        TypeError: for a model that is no module.

    Example:
        >>> import torch, pyflowkern
        >>> pyflowkern.restore(torch.nn.Linear(2, 2))
    """
    if model is None:
        with _lock:
            _holds.clear()
            restore_classes()
            restore_functions()
        return
    _check(model)
    for module in model.modules():
        take_away(module)


def _release(hold: _Hold) -> None:
    """End one call of ``accelerate()``; the last one undoes what all of them did."""
    with _lock:
        if hold in _holds:
            _holds.remove(hold)
            if not _holds:
                restore()


def _check(model: object) -> None:
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def _equip_noted(model: torch.nn.Module) -> None:
    """Put doors on a model that the process has built; what is left alone of it goes into the reports, once."""
    left = [replace(entry, name="") for entry in _equip_all(model) if not entry.runs]
    for hold in [
        *_holds
    ]:  # without the lock, whose holder may wait for the one of classes, which is held here
        hold.entries += [entry for entry in dict.fromkeys(left) if entry not in hold.entries]


class _Part(NamedTuple):
    """What is to be said of one module.

    Args:
        known: whether its class is known, or that of a base.
        whole: whether it is one transform, and not a sequence of transforms.
    """

    entry: Entry
    known: bool
    whole: bool

    def covers(self, part: _Part) -> bool:
        """Whether nothing is to be said of a part of this transform that is left alone, as it runs within this one."""
        above, name = self.entry.name, part.entry.name
        if not self.whole or name == above or not name.startswith(f"{above}." if above else ""):
            return False
        return bool(self.entry.runs) or not part.known


def _equip_all(model: torch.nn.Module) -> list[Entry]:
    """Put doors on all modules that are known, parts first; return what is to be said, the model first."""
    parts = [_equip(name, module) for name, module in reversed([*model.named_modules()])]
    found = [part for part in reversed(parts) if part is not None]
    wholes = [part for part in found if part.whole]
    return [
        part.entry
        for part in found
        if part.entry.runs or not any(whole.covers(part) for whole in wholes)
    ]


def _equip(name: str, module: torch.nn.Module) -> _Part | None:
    """Put doors on one module; return what is to be said of it."""
    cls = type(module)
    if (found := kind_of(cls)) is not None:
        kind, label = found
        entry = _equip_known(name, module, kind, label)
        return None if entry is None else _Part(entry, True, not kind.holds)
    if (base := known_base(cls)) is not None:
        note = f"a subclass of {base[1]} may do anything"
        entry = Entry(name, f"{cls.__module__}.{cls.__name__}", note=note)
        return _Part(entry, True, not base[0].holds)
    label = label_of_unknown(cls)
    return _Part(Entry(name, label, note="no op knows it"), False, True) if label else None


def _equip_known(name: str, module: torch.nn.Module, kind: Kind, label: str) -> Entry | None:
    """Put doors on a module of a class that is known; return what is to be said of it."""
    take_away(module)  # of an earlier call
    if any(method in module.__dict__ for method in kind.methods):
        return Entry(name, label, note="a method was replaced for this instance")
    try:  # what is compared is on the CPU, in the dtypes that it is given, and draws nothing of the user's
        with (
            torch.device("cpu"),
            torch.autocast("cpu", enabled=False),
            torch.random.fork_rng(devices=[]),
        ):
            outcome = kind.look(module)
    except Exception as error:  # an instance that is not what its class makes of others
        return Entry(name, label, note=f"looking at it failed: {type(error).__name__}: {error}")
    for door in (*outcome.doors, *([ReplicaDoor(module)] if outcome.doors else [])):
        put(door)
    if not outcome.runs and (kind.quiet or not outcome.note):
        return None
    runs = outcome.runs if outcome.doors else ""
    gain = outcome.gain or (expected_gain(label) if runs else "")
    defect = known_defect(label) if runs else ""
    notes = (outcome.note, defect, _of_wide(outcome))
    return Entry(name, label, runs, gain, "; ".join(filter(None, notes)))


def _of_wide(outcome: Outcome) -> str:
    """Return what to know of a transform with a wide network; empty for others."""
    layers = [layer for door in outcome.doors if (layer := getattr(door, "layer", None))]
    link = layers[0]._chain_link() if layers else None
    if link is None or not link.wide:
        return ""
    return "its network is so wide that on the CPU it is called while gradients are recorded"
