"""Which processes train a layer together, and how to write parameters that are sharded over them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any
from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["moments_of_all", "process_groups", "write_parameters"]

#: The groups of layers that ran in a ``DistributedDataParallel``.
_LAST: WeakKeyDictionary[torch.nn.Module, list[Any]] = WeakKeyDictionary()


def process_groups(layer: torch.nn.Module) -> list[Any]:
    """Return the process groups over which the layer's gradients are averaged: none where one process trains it.

    They are the group of the ``DistributedDataParallel`` whose forward is running, or those of the mesh over which
    ``fully_shard`` shards the layer's parameters, one for each axis; a layer without such parameters has those of the
    module around it.  A backward pass may call a layer again, as checkpointing does: then they are those of its last
    call.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    mesh = _mesh_of(layer)
    if mesh is not None:
        return [mesh.get_group(axis) for axis in range(mesh.ndim)]
    wrapper = DistributedDataParallel._get_active_ddp_module()
    if wrapper is not None:
        _LAST[layer] = [wrapper.process_group]
        return _LAST[layer]
    if torch._C._current_graph_task_id() != -1:
        return _LAST.get(layer, [])
    _LAST.pop(layer, None)
    return []


def moments_of_all(
    mean: Tensor, var: Tensor, count: Tensor, groups: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and count over all processes of the groups, some of which may have no data.

    One exchange a group; every process computes the same from what all have sent.  Gradients of mean and variance are
    those of what all processes compute from them.
    """
    if not groups:
        return mean, var, count
    mean, var = (torch.where(count > 0, t, 0.0) for t in (mean, var))
    rows = torch.cat([mean, var, count.view(1)])[None]
    for group in reversed(groups):
        rows = _gathered(rows, group)
    means, variances = rows[:, : len(mean)], rows[:, len(mean) : -1]
    counts = rows[:, -1:].detach()
    total = counts.sum()
    parts = counts / total  # products with counts could overflow
    total_mean = (parts * means).sum(0)
    return total_mean, (parts * (variances + (means - total_mean).square())).sum(0), total


def _gathered(rows: Tensor, group: Any) -> Tensor:
    """Return the rows of all processes of a group, one after another: sums with zeros, which have derivatives."""
    rank, size = dist.get_rank(group), dist.get_world_size(group)
    padded = torch.nn.functional.pad(rows[None], (0, 0, 0, 0, rank, size - 1 - rank))
    return _Sum.apply(padded, group).flatten(0, 1)  # type: ignore[no-any-return, no-untyped-call]


class _Sum(torch.autograd.Function):
    """The sum over all processes of a group, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, group: Any) -> Tensor:
        ctx.group = group
        t = t.clone(memory_format=torch.contiguous_format)
        dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Sum.apply(grads[0], ctx.group), None  # type: ignore[no-untyped-call]


@torch.no_grad()
def write_parameters(layer: torch.nn.Module, values: dict[str, Tensor]) -> None:
    """Write values, given by parameter name and equal in all processes, into the layer's parameters.

    While a layer under ``fully_shard`` runs, its parameters are gathered copies that last only for that run, so this
    process's shard is also written.
    """
    for name, value in values.items():
        getattr(layer, name).copy_(value)
    for part in _sharded(layer):
        if (value := values.get(part._module_info.param_name)) is not None:  # type: ignore[assignment]
            _write_part(part.sharded_param, value)


def _mesh_of(layer: torch.nn.Module) -> Any:
    """Return the mesh over which ``fully_shard`` has the layer, None where it has not."""
    for part in _sharded(layer):
        return part.sharded_param.device_mesh
    if not getattr(layer, "_is_fsdp_managed_module", False):
        return None
    around = []
    for group in _groups():
        inside = [each for module in group.modules for each in module.modules()]
        if any(each is layer for each in inside):
            around.append((len(inside), group.fsdp_params[0].sharded_param.device_mesh))
    return min(around, key=lambda found: found[0])[1] if around else None


def _sharded(layer: torch.nn.Module) -> Iterator[Any]:
    """Yield FSDP2's record of each parameter of the layer."""
    for group in _groups():
        for part in group.fsdp_params:
            if part._module_info.module is layer:
                yield part


def _groups() -> Iterator[Any]:
    """Yield FSDP2's records of parameters that are sharded together; torch has no public function for it."""
    module = sys.modules.get("torch.distributed._composable_state")
    if module is None or "torch.distributed.fsdp" not in sys.modules:
        return
    for reference in list(module._module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 has one a state
            groups = [getattr(state, "_fsdp_param_group", None)]
        yield from (group for group in groups if group is not None and group.fsdp_params)


def _write_part(parameter: Any, value: Tensor) -> None:
    """Write this process's shard of a value that every process holds in full."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    local = parameter.to_local()
    value = value.to(local.device, local.dtype)
    whole = distribute_tensor(
        value, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    )
    local.copy_(whole.redistribute(placements=parameter.placements).to_local())
