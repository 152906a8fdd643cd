"""Which processes train a layer together, and how to write parameters that are sharded over them."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

__all__ = ["moments_of_all", "process_groups", "write_parameters"]


def process_groups(layer: torch.nn.Module) -> list[Any]:
    """Return the process groups over which the layer's gradients are averaged: none where one process trains it.

    They are the group of the ``DistributedDataParallel`` whose forward is running, or those of the mesh over which
    ``fully_shard`` shards the layer's parameters, one for each axis.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return []
    for part in _sharded(layer):
        mesh = part.sharded_param.device_mesh
        return [mesh.get_group(axis) for axis in range(mesh.ndim)]
    wrapper = DistributedDataParallel._get_active_ddp_module()
    return [] if wrapper is None else [wrapper.process_group]


def moments_of_all(
    mean: Tensor, var: Tensor, count: Tensor, groups: list[Any]
) -> tuple[Tensor, Tensor, Tensor]:
    """Return mean, variance and count over all processes of the groups, some of which may have no data.

    Gradients of mean and variance are those of what all processes compute from them.
    """
    if not groups:
        return mean, var, count
    mean, var = (torch.where(count > 0, t, 0.0) for t in (mean, var))
    sums = _Sum.apply(torch.cat([count * mean, count.view(1)]), groups)  # type: ignore[no-untyped-call]
    total_mean, total = sums[:-1] / sums[-1], sums[-1].detach()
    squares = _Sum.apply(count * (var + (mean - total_mean).square()), groups)  # type: ignore[no-untyped-call]
    return total_mean, squares / total, total


class _Sum(torch.autograd.Function):
    """The sum over all processes of some groups, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, t: Tensor, groups: list[Any]) -> Tensor:
        ctx.groups = groups
        t = t.clone(memory_format=torch.contiguous_format)
        for group in groups:
            dist.all_reduce(t, group=group)
        return t

    @staticmethod
    def backward(ctx: Any, *grads: Any) -> Any:
        return _Sum.apply(grads[0], ctx.groups), None  # type: ignore[no-untyped-call]


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


def _sharded(layer: torch.nn.Module) -> Iterator[Any]:
    """Yield FSDP2's record of each parameter of the layer; torch has no public function for it."""
    module = sys.modules.get("torch.distributed._composable_state")
    if module is None or "torch.distributed.fsdp" not in sys.modules:
        return
    for reference in list(module._module_state_mapping.values()):
        state = reference()
        groups = getattr(state, "_fsdp_param_groups", None)
        if groups is None:  # torch before 2.12 has one a state
            groups = [getattr(state, "_fsdp_param_group", None)]
        for group in groups:
            for part in () if group is None else group.fsdp_params:
                if part._module_info.module is layer:
                    yield part


def _write_part(parameter: Any, value: Tensor) -> None:
    """Write this process's shard of a value that every process holds in full."""
    from torch.distributed.tensor import Replicate, distribute_tensor

    local = parameter.to_local()
    value = value.to(local.device, local.dtype)
    whole = distribute_tensor(
        value, parameter.device_mesh, [Replicate()] * parameter.device_mesh.ndim
    )
    local.copy_(whole.redistribute(placements=parameter.placements).to_local())
