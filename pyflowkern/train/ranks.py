"""Several processes that train one flow: who starts them, what they agree on, and what they say when one is lost."""

from __future__ import annotations

import copy
import os
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments.lightning import LightningEnvironment
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch.strategies import DDPStrategy, Strategy
from torch import Tensor

from pyflowkern.data import Batches, DataSet
from pyflowkern.nn import ActNorm, BatchNorm
from pyflowkern.train.config import ConfigError, TrainConfig
from pyflowkern.train.data_model import DataModel

__all__ = [
    "ProcessLost",
    "check_alike",
    "check_shares",
    "check_started",
    "check_strategy",
    "lost_processes",
    "start_together",
    "started_by_torchrun",
    "strategy_options",
    "sum_of_all",
    "threads_for_processes",
]

#: What backends say when another process is gone.
_LOST = ("gloo", "NCCL", "Connection closed", "Connection reset", "Broken pipe", "Timed out")


class ProcessLost(RuntimeError):
    """Another process of the run ended, so that this one cannot go on.  The message is one line.

    Example:
        >>> from pyflowkern.train import ProcessLost
        >>> ProcessLost("another process of the run ended").exit_code  # of a command that ends so
        1
    """

    exit_code = 1


def started_by_torchrun(config: TrainConfig) -> TrainConfig:
    """Return the config with as many processes as torchrun has started; as it is without torchrun."""
    if not _by_torchrun():
        return config
    devices = int(os.environ["LOCAL_WORLD_SIZE"])
    nodes = int(os.environ["WORLD_SIZE"]) // devices
    return TrainConfig.create(config.to_dict() | {"devices": devices, "nodes": nodes})


def _by_torchrun() -> bool:
    return dist.is_available() and dist.is_torchelastic_launched()


def strategy_options(config: TrainConfig, model: DataModel, data: DataSet) -> dict[str, Any]:
    """Return what Lightning's trainer must know of the processes.

    Buffers are equal in all processes without being sent: layers start from the same batch, see :func:`start_together`.
    """
    options: dict[str, Any] = {"devices": config.devices, "num_nodes": config.nodes}
    ranks = config.devices * config.nodes
    check_shares(min(config.batch_size, len(data.train)), ranks)
    if ranks > 1:
        options["strategy"] = DDPStrategy(
            broadcast_buffers=False,
            find_unused_parameters=_has_idle_parameters(model, data, config.seed),
        )
    return options


def check_started(strategy: Strategy, config: TrainConfig) -> None:
    """Raise ConfigError unless the processes of the run are those that somebody starts.

    Else they would wait for others, or each would train alone and write the same files.
    """
    devices, nodes = config.devices, config.nodes
    environment = getattr(strategy, "cluster_environment", None)
    of_slurm = isinstance(environment, SLURMEnvironment)
    alone = _by_torchrun() or "SLURM_PTY_PORT" in os.environ  # a shell on a node is one task
    tasks = 1 if alone else int(os.environ.get("SLURM_STEP_NUM_TASKS", 1))
    if tasks != (devices * nodes if of_slurm else 1):
        raise ConfigError(
            f"devices={devices} and nodes={nodes} want {devices * nodes} processes, and srun has started {tasks}: give "
            "srun as many tasks, and --devices and --nodes as it has them (in interactive allocations use torchrun)"
        )
    by_hand = isinstance(environment, LightningEnvironment)
    if nodes > 1 and by_hand and "NODE_RANK" not in os.environ:
        raise ConfigError(
            f"a run of {nodes} machines is started on each of them, by torchrun or SLURM, or with MASTER_ADDR, "
            "MASTER_PORT and NODE_RANK in the environment; --nodes 1 runs on this machine alone"
        )
    if environment is not None:
        environment.validate_settings(num_devices=devices, num_nodes=nodes)


def check_shares(rows: int, ranks: int) -> None:
    """Raise ConfigError unless each process gets a row of every batch."""
    if rows < ranks:
        raise ConfigError(
            f"a batch of {rows} rows is too small for {ranks} processes: each needs a row at least"
        )


def check_strategy(strategy: Strategy) -> None:
    """Raise ConfigError unless each process has all weights: the norm of gradients and averages are taken of those."""
    if not isinstance(strategy, DDPStrategy):
        raise ConfigError(
            f"several processes are trained by Lightning's strategy ddp, got {type(strategy).__name__}; for sharded "
            "parameters write a loop with torch's fully_shard"
        )


def _has_idle_parameters(model: DataModel, data: DataSet, seed: int) -> bool:
    """Whether a step leaves parameters without a gradient: those of a layer without effect, or of the other direction.

    Processes must know it, and looking for such parameters in every step takes time; so a copy takes one step.
    """
    rows = Batches(data, 16, seed).batch(0)
    trial = copy.deepcopy(model).train()
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trial.objective(rows)[0].backward()
    return any(p.requires_grad and p.grad is None for p in trial.parameters())


def start_together(model: torch.nn.Module) -> list[ActNorm | BatchNorm]:
    """Let layers that start from data, or normalize by them, take the batches of all processes; return which.

    Those that were given a group keep it.
    """
    layers = [m for m in model.modules() if isinstance(m, (ActNorm, BatchNorm))]
    joined = [layer for layer in layers if layer.process_group is None]
    for layer in joined:
        layer.process_group = dist.group.WORLD
    return joined


def check_alike(facts: dict[str, Any]) -> None:
    """Raise ConfigError in all processes unless all of them have the same facts."""
    found: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(found, facts)
    for rank, others in enumerate(found):
        for name, value in facts.items():
            if value != (theirs := others[name]):
                raise ConfigError(
                    f"process {rank} has another {name} ({theirs}) than process {dist.get_rank()} ({value}): "
                    "all must see the same files"
                )


def sum_of_all(t: Tensor, ranks: int) -> Tensor:
    """Return the sum over all processes, which is written to ``t``."""
    if ranks > 1:
        dist.all_reduce(t)
    return t


@contextmanager
def lost_processes(out: Path, ranks: int) -> Iterator[None]:
    """Make what the backend says of a lost process one line that tells how to go on."""
    try:
        yield
    except RuntimeError as error:
        text = " ".join(str(error).split())
        known = isinstance(error, dist.DistError) or (
            type(error) is RuntimeError and any(word in text for word in _LOST)
        )
        text = re.sub(r"^\[/[^\]]*\] *", "", text)  # the place in gloo's sources
        if ranks < 2 or not known:
            raise
        raise ProcessLost(
            f"another process of the run ended ({text[:120]}); "
            f"go on with: pyflowkern train --resume {out}"
        ) from None


@contextmanager
def threads_for_processes(ranks: int) -> Iterator[None]:
    """Keep Lightning from choosing a number of threads, which has been chosen."""
    name = "OMP_NUM_THREADS"
    if ranks < 2 or name in os.environ:
        yield
        return
    os.environ[name] = str(torch.get_num_threads())
    try:
        yield
    finally:
        os.environ.pop(name, None)
