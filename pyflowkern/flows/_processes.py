"""What a flow notices of wrappers that train it in several processes: they act on calls of a module alone."""

from __future__ import annotations

import gc
import sys
import warnings
from collections.abc import Callable, Iterator
from types import TracebackType
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

__all__ = ["InProcesses"]

#: What torch says of a ``DTensor`` that an op cannot take.
_OF_SHARDS = ("DTensor", "sharding strategy")


class InProcesses(torch.nn.Module):
    """A module that learns of it when ``DistributedDataParallel`` wraps it."""

    #: ``id(self)`` once it was wrapped: a copy is another module.
    _wrapped = 0
    _ignored: tuple[str, ...] = ()

    @property
    def _ddp_params_and_buffers_to_ignore(self) -> tuple[str, ...]:
        """What ``DistributedDataParallel`` is to leave alone.  It asks when it wraps a module; nobody else does."""
        for module in self.modules():
            if isinstance(module, InProcesses):
                module.__dict__["_wrapped"] = id(module)
        return self._ignored

    @_ddp_params_and_buffers_to_ignore.setter
    def _ddp_params_and_buffers_to_ignore(self, names: Any) -> None:
        self.__dict__["_ignored"] = tuple(names)

    def _run(self, function: Callable[..., Any], *arguments: Any, **options: Any) -> Any:
        """Call a part of this module; name parameters that it finds sharded."""
        try:
            return function(*arguments, **options)
        except RuntimeError as error:
            _raise_if_sharded(self, error)
            raise

    def _notice_direct_calls(self) -> None:
        """Warn once if a call records gradients that will not be averaged over processes.

        That is one of the module in a ``DistributedDataParallel`` whose own ``forward`` does not run.
        """
        if self._wrapped != id(self) or torch.compiler.is_compiling():
            return
        if not (self.training and torch.is_grad_enabled() and dist.is_initialized()):
            return
        if DistributedDataParallel._get_active_ddp_module() is not None:
            return
        if (
            torch._C._current_graph_task_id() != -1
        ):  # checkpointing calls again what the wrapper called
            return
        self.__dict__["_wrapped"] = 0
        if any(_averages(each, self) for each in gc.get_objects()):  # it may be gone
            warnings.warn(
                f"{type(self).__name__} lies in a DistributedDataParallel and was called directly: gradients of this "
                "call are not averaged, and a training loop by it lets the processes drift apart.  Call the wrapper: "
                "DistributedDataParallel(flows.NegativeLogLikelihood(flow)) returns the loss; in evaluation use "
                "eval() or no_grad()",
                RuntimeWarning,
                stacklevel=4,
            )


def _averages(wrapper: object, module: torch.nn.Module) -> bool:
    if not issubclass(type(wrapper), DistributedDataParallel):
        return False
    assert isinstance(wrapper, DistributedDataParallel)
    inside = any(each is module for each in wrapper.modules())
    return inside and dist.get_world_size(wrapper.process_group) > 1


def _raise_if_sharded(flow: torch.nn.Module, error: RuntimeError) -> None:
    """Raise an error that names the module and the remedy if what failed is reading parameters that are sharded.

    ``fully_shard`` gathers the parameters of a module around its ``forward`` alone.  Ops then meet a ``DTensor`` beside
    tensors, and refuse.
    """
    tensors = sys.modules.get("torch.distributed.tensor")
    if tensors is None or not any(words in str(error) for words in _OF_SHARDS):
        return
    names = {module: name for name, module in flow.named_modules()}
    for module in _running(error.__traceback__):
        parameters = () if module not in names else module.named_parameters()
        found = next((n for n, p in parameters if isinstance(p, tensors.DTensor)), None)
        if found is not None:
            name = ".".join(filter(None, (names[module], found)))
            raise RuntimeError(
                f"{name} of the flow is sharded over processes and was read where it is not gathered: fully_shard "
                "gathers the parameters of a module around its forward alone.  Shard whole steps of the flow, as the "
                "items of flow.bijection, or the whole flow, not parts of a step; and for each module that was sharded "
                "call torch.distributed.fsdp.register_fsdp_forward_method(module, name) with the other methods that "
                "run it: 'inverse' for steps; 'log_prob', 'inverse', 'sample' and the like for the flow"
            ) from error


def _running(traceback: TracebackType | None) -> Iterator[torch.nn.Module]:
    """Yield the modules whose methods ran when an error was raised, the innermost first."""
    modules = []
    while traceback is not None:
        module = traceback.tb_frame.f_locals.get("self")
        if isinstance(module, torch.nn.Module):
            modules.append(module)
        traceback = traceback.tb_next
    return reversed(modules)
