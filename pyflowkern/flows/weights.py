"""Weights in files of the safetensors format: numbers and text, nothing that runs when it is read."""

from __future__ import annotations

import json
from collections.abc import Mapping
from os import PathLike
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from pyflowkern._version import __version__
from pyflowkern.core.files import write_atomic
from pyflowkern.flows._base import Flow
from pyflowkern.nn import Sequential, Standardize

__all__ = ["load_flow", "load_weights", "save_weights"]

Module = TypeVar("Module", bound=nn.Module)


def save_weights(
    module: nn.Module,
    path: str | PathLike[str],
    *,
    arguments: Mapping[str, Any] | None = None,
) -> None:
    """Write all parameters and buffers of a flow or a layer to a safetensors file, which appears once it is whole.

    Names are those of ``state_dict``.  Buffers such as ActNorm's ``initialized`` and the statistics of
    :class:`~pyflowkern.nn.Standardize` are among them.  A tensor that has several names is written once, and the
    metadata say which names share it.

    Args:
        module: a flow, or any other module; on any device.
        path: the file, which is replaced if it is there.
        arguments: those that the flow was made with, by name, for :func:`load_flow`: numbers, text, lists and None.
            A flow is made of them on the spot, without memory, to see that it has these weights.

    Raises:
        TypeError: for a module that is none, for arguments with a module that is no flow of ``pyflowkern.flows``,
            and for arguments that JSON has no words for.
        ValueError: for arguments that make another flow.
        ModuleNotFoundError: without the package safetensors (the extra ``pyflowkern[safetensors]``).
        OSError: naming the file, for a full disk and the like.

    Source: the format is that of Hugging Face's safetensors (2022).

    Example:
        >>> import tempfile
        >>> from pyflowkern import flows
        >>> file = tempfile.mkdtemp() + "/flow.safetensors"
        >>> made = {"event_shape": 3, "transforms": 2, "hidden": [16]}
        >>> flows.save_weights(flows.MAF(**made), file, arguments=made)
        >>> type(flows.load_flow(file)).__name__
        'MAF'
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    from safetensors.torch import save

    state, metadata = module.state_dict(), {"format": "pt", "pyflowkern": __version__}
    if arguments is not None:
        metadata |= _recipe(module, arguments, state)
    kept, shared = _without_copies(state)
    if shared:
        metadata["shared"] = json.dumps(shared)
    own = {name: t.detach().cpu().contiguous().clone() for name, t in kept.items()}
    write_atomic(Path(path), save(own, metadata))


def load_weights(module: Module, path: str | PathLike[str]) -> Module:
    """Read weights of a safetensors file into a module, and return it; all of them, or none.

    Args:
        module: made with the same arguments as the one that was saved, in the same dtype; on any device.
        path: the file, of :func:`save_weights` or of another program that uses the names of ``state_dict``.

    Raises:
        TypeError: for a module that is none, and for a tensor of another dtype, by its name.
        ValueError: for a file that is damaged or in another format, for missing and for unknown names, and for a
            tensor of another shape, by its name.
        FileNotFoundError: for no such file.
        ModuleNotFoundError: without the package safetensors.

    Example:
        >>> import tempfile, torch
        >>> from pyflowkern import flows
        >>> file = tempfile.mkdtemp() + "/flow.safetensors"
        >>> flow, other = (flows.MAF(3, transforms=2, hidden=(16,)) for _ in range(2))
        >>> flows.save_weights(flow, file)
        >>> x = torch.randn(4, 3)
        >>> bool((flows.load_weights(other, file).log_prob(x) == flow.log_prob(x)).all())
        True
    """
    if not isinstance(module, nn.Module):
        raise TypeError(f"module must be a torch.nn.Module, got {type(module).__name__}")
    tensors, _ = _read(Path(path))
    _check_fit(path, tensors, module.state_dict())
    module.load_state_dict(tensors)
    return module


def load_flow(path: str | PathLike[str]) -> Flow:
    """Make the flow of a safetensors file that :func:`save_weights` wrote with ``arguments``.

    The file names a class of ``pyflowkern.flows`` and its arguments as data: no other class is made, and nothing in
    the file is run.  Sizes are the file's, so that a hostile one may ask for more memory than there is.

    Args:
        path: the file.

    Returns:
        The flow, on the CPU, in the dtype that it was saved in, in training mode, as a new flow is.

    Raises:
        ValueError: for a file without arguments, of an unknown class, and as :func:`load_weights`.
        FileNotFoundError: for no such file.
        ModuleNotFoundError: without the package safetensors.

    Example:
        >>> import tempfile
        >>> from pyflowkern import flows
        >>> file = tempfile.mkdtemp() + "/flow.safetensors"
        >>> made = {"event_shape": 2, "steps": 2, "hidden": 8}
        >>> flows.save_weights(flows.RealNVP(**made).double(), file, arguments=made)
        >>> flows.load_flow(file).eval().sample(5).dtype
        torch.float64
    """
    tensors, metadata = _read(Path(path))
    if "flow" not in metadata:
        raise ValueError(
            f"{path}: holds no arguments; save it with save_weights(..., arguments=...), or make the flow and call "
            "load_weights"
        )
    try:
        flow = _make(metadata["flow"], json.loads(metadata["arguments"]))
        if metadata.get("standardized") == "true":
            flow.standardize()
        flow = flow.to(_dtype(metadata["dtype"]))
    except (ArithmeticError, KeyError, MemoryError, RuntimeError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: its flow cannot be made ({reason})") from None
    _check_fit(path, tensors, flow.state_dict())
    flow.load_state_dict(tensors)
    return flow


def _make(name: str, arguments: dict[str, Any]) -> Flow:
    """Make a flow of a class of this package; names of anything else are refused."""
    from pyflowkern import flows  # whose names are complete once this file has been read

    kind = getattr(flows, name) if name in flows.__all__ else None
    if not (isinstance(kind, type) and issubclass(kind, Flow) and kind is not Flow):
        raise ValueError(f"unknown flow {name!r}")
    return kind(**arguments)


def _dtype(name: str) -> torch.dtype:
    found = getattr(torch, name, None)
    if not (isinstance(found, torch.dtype) and found.is_floating_point):
        raise ValueError(f"unknown dtype {name!r}")
    return found


def _recipe(
    module: nn.Module, arguments: Mapping[str, Any], state: dict[str, Tensor]
) -> dict[str, str]:
    """Return what :func:`load_flow` needs, having seen that it makes a flow with these weights."""
    if not isinstance(module, Flow):
        raise TypeError(f"arguments must be None for a {type(module).__name__}, which is no flow")
    try:
        text = json.dumps(dict(arguments))
        again = json.loads(text)
    except (TypeError, ValueError) as error:
        raise TypeError(f"arguments must be numbers, text, lists or None: {error}") from None
    layers = module.bijection
    standardized = (
        type(layers) is Sequential and len(layers) > 0 and type(layers[0]) is Standardize
    )
    name = type(module).__name__
    with torch.device("meta"):
        try:
            made = _make(name, again)
            if standardized:
                made.standardize()
        except (TypeError, ValueError) as error:
            raise ValueError(f"arguments make no {name}: {error}") from None
    wanted = {key: tuple(t.shape) for key, t in made.state_dict().items()}
    for key in wanted.keys() | state.keys():
        if wanted.get(key) != (tuple(state[key].shape) if key in state else None):
            raise ValueError(f"arguments must be those of the flow, but they make another {key}")
    dtype = str(module._anchor.dtype).removeprefix("torch.")
    recipe = {"flow": name, "arguments": text, "dtype": dtype}
    return recipe | ({"standardized": "true"} if standardized else {})


def _without_copies(state: dict[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return the tensors, each once, and of further names of one tensor the name that it is kept under."""
    kept: dict[str, Tensor] = {}
    shared: dict[str, str] = {}
    names: dict[tuple[Any, ...], str] = {}
    for name, t in state.items():
        key = (t.device, t.data_ptr(), t.dtype, tuple(t.shape), t.stride())
        if t.numel() and key in names:
            shared[name] = names[key]
        else:
            kept[name], names[key] = t, name
    return kept, shared


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Return tensors and metadata of a file, tensors under all of their names."""
    from safetensors import SafetensorError, safe_open

    if path.exists() and not path.is_file():  # opening a named pipe would wait for ever
        raise ValueError(f"{path}: not a regular file")
    try:
        with safe_open(path, framework="pt") as file:
            metadata: dict[str, str] = file.metadata() or {}
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
        shared = json.loads(metadata.get("shared", "{}"))
        tensors |= {name: tensors[kept] for name, kept in shared.items()}
    except FileNotFoundError:
        raise FileNotFoundError(f"{path}: no such file") from None
    except (SafetensorError, AttributeError, KeyError, TypeError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{path}: not a safetensors file, or a damaged one ({reason})") from None
    return tensors, metadata


def _check_fit(
    path: str | PathLike[str], tensors: dict[str, Tensor], state: dict[str, Tensor]
) -> None:
    """Raise for the first way in which tensors are not those of a state."""
    for what, names in (
        ("lacks", sorted(state.keys() - tensors.keys())),
        ("has what the module has not:", sorted(tensors.keys() - state.keys())),
    ):
        if names:
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            raise ValueError(f"{path}: {what} {', '.join(names[:3])}{more}")
    for name, wanted in state.items():
        found = tensors[name]
        if found.shape != wanted.shape:
            raise ValueError(
                f"{path}: {name} must have shape {list(wanted.shape)}, got {list(found.shape)}"
            )
        if found.dtype != wanted.dtype:
            raise TypeError(f"{path}: {name} must be {wanted.dtype}, got {found.dtype}")
