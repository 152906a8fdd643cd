"""Transforms of images of other libraries, which run by a few ops in the place of many."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor

from pyflowkern._library import kernel_serves
from pyflowkern.core.dtypes import PLAIN_TENSORS
from pyflowkern.interop._check import comparable, same_values
from pyflowkern.interop._doors import MethodDoor, the_library_itself
from pyflowkern.nn.chain import undisturbed
from pyflowkern.nn.convolutions import convolutions
from pyflowkern.nn.links import Link, Watched, obstructed
from pyflowkern.ops.conv_network import evaluate_convolutions

__all__ = [
    "Form",
    "FormDoor",
    "Forms",
    "evaluate_sequential",
    "form_disagreement",
    "served_samples",
]

_DTYPES = (torch.float32, torch.float64)


class Form:
    """What a transform of images is: subclasses read it from the modules, and run it.

    Args:
        module: the transform, each part of which is to be watched in ``link``.
    """

    #: Channels of the images; None where any do.
    channels: int | None = None

    def __init__(self) -> None:
        self.link = Link()
        self.watched: Watched | None = None

    def run(self, x: Tensor, tensors: list[Tensor], inverse: bool) -> Any:
        """Do what the method does; return None where the library must.

        Args:
            x: images ``[N, C, H, W]``, or vectors ``[N, C]``.
            tensors: those that the link reads, as they are now.
            inverse: from latent to data.
        """
        raise NotImplementedError


class Forms:
    """The form of one transform, found anew whenever a part of it is another.

    Args:
        module: the transform.
        read: what finds its form; None where the library should run it.
    """

    def __init__(
        self, module: torch.nn.Module, read: Callable[[torch.nn.Module], Form | None]
    ) -> None:
        self._module, self._read = module, read
        self._form: Form | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        """Copies and pickles start empty."""
        return Forms, (self._module, self._read)

    def run(self, x: object, name: str, inverse: bool) -> Any:
        """Do what the method of that name does, by a few ops; None where they do not serve."""
        if not served_samples(x) or (ready := self.ready(x, name)) is None:
            return None
        form, tensors = ready
        return form.run(x, tensors, inverse)

    def ready(self, x: Tensor, name: str) -> tuple[Form, list[Tensor]] | None:
        """Return the form and its tensors as they are now, where they may stand for the method of that name."""
        if (form := self._known()) is None or (watched := form.watched) is None:
            return None
        if form.channels not in (None, x.shape[1]) or watched.overrides(name):
            return None
        if (tensors := watched.tensors()) is None:
            return None
        fit = all(t.dtype == x.dtype and t.device == x.device for t in tensors)
        return (form, tensors) if fit else None

    def _known(self) -> Form | None:
        """Return the form; None where something hangs on a part."""
        form = self._form
        if form is None or form.watched is None or not form.watched.unchanged():
            self._form = form = self._read(self._module)
            if form is None or obstructed(form.link):
                return None
            form.watched = Watched(form.link)
        return form


class FormDoor(MethodDoor):
    """One direction of a transform of images.

    Args:
        module: the transform.
        name: the method.
        inverse: whether it is the one from latent to data.
        read: what finds its form; None where the library should run it.
    """

    def __init__(
        self,
        module: torch.nn.Module,
        name: str,
        inverse: bool,
        read: Callable[[torch.nn.Module], Form | None],
    ) -> None:
        super().__init__(module, name)
        self.inverse = inverse
        self._forms = Forms(module, read)

    def run(self, *args: Any, **kwargs: Any) -> Any:
        """Run a few ops; the library's method where they do not serve."""
        if len(args) == 1 and not kwargs:
            found = self._forms.run(args[0], self.name, self.inverse)
            if found is not None:
                return found
        return self.own(*args, **kwargs)


def form_disagreement(
    module: torch.nn.Module,
    directions: Mapping[str, bool],
    read: Callable[[torch.nn.Module], Form | None],
    shape: Sequence[int] = (),
    put_in: Mapping[torch.nn.Module, torch.nn.Module] | None = None,
) -> str:
    """Return why ops must not stand for a transform, found by running both on a few numbers; empty if they may.

    Args:
        module: the transform.
        directions: the methods, and whether each is the inverse of the form.
        read: what finds the form.
        shape: of a sample; as many channels as the form says, of 4x4 pixels, where none is given.
        put_in: what to compare with in the place of parts.
    """
    try:
        known: dict[int, Any] = {id(old): new for old, new in (put_in or {}).items()}
        twin = comparable(copy.deepcopy(module, known))
    except Exception as error:
        return f"it cannot be copied to be compared: {type(error).__name__}"
    form = read(twin)
    if form is None:
        return "its form or a part of it is not known"
    draw = torch.Generator().manual_seed(1)
    sizes = (2, *(shape or (form.channels or 2, 4, 4)))
    forms = Forms(twin, read)
    for name, inverse in directions.items():
        x = torch.randn(sizes, generator=draw, dtype=torch.float64)
        with torch.no_grad(), the_library_itself():
            try:
                want = getattr(twin, name)(
                    x
                )  # perhaps the first batch, by which it initialises itself
                want = getattr(twin, name)(x)
            except Exception as error:
                return (
                    f"the library itself fails on a few numbers: {type(error).__name__}: {error}"
                )
            got = forms.run(x, name, inverse)
        if got is None:
            return "hooks or methods of its own hang on it"
        if not same_values(*map(_flat, (got, want))):
            return "its values are not those of the form that its name says"
    return ""


def _flat(results: Any) -> tuple[Tensor, ...]:
    return (results,) if isinstance(results, Tensor) else tuple(results)


def served_samples(x: object) -> TypeGuard[Tensor]:
    """Whether ops take such vectors or images, and calling the library would do nothing else than they do."""
    return (
        isinstance(x, Tensor)
        and not torch.compiler.is_compiling()
        and type(x) in PLAIN_TENSORS
        and x.dim() in (2, 4)
        and 0 not in x.shape
        and kernel_serves("affine_coupling", x, dtypes=_DTYPES)
        and undisturbed(x)
    )


def evaluate_sequential(
    x: Tensor, net: torch.nn.Module, layers: Sequence[Any], activations: Sequence[Any]
) -> Tensor:
    """Return ``net(x)`` of convolutions with activations between them: by one op where that is faster."""
    if layers and (params := convolutions(x, layers, activations)) is not None:
        return evaluate_convolutions(x, *params, None, False, True)
    out: Tensor = net(x)
    return out
