"""What a run knows of its processes, without starting them."""

import signal
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.strategies import FSDPStrategy

from pyflowkern.train import FlowModule, TrainConfig, TrainingInterrupted, train
from pyflowkern.train.bridges import load_data
from pyflowkern.train.config import ConfigError
from pyflowkern.train.model import build, score
from pyflowkern.train.progress import progress
from pyflowkern.train.ranks import ProcessLost, lost_processes
from pyflowkern.train.threads import limited_threads

SMALL = {
    "data": "digits",
    "flow": "Glow",
    "flow_args": {"levels": 1, "steps": 1, "hidden": 4},
    "steps": 1,
}
#: What SLURM tells each process, also that of a script that does not call srun.
OF_SLURM = dict.fromkeys(("SLURM_PROCID", "SLURM_LOCALID", "SLURM_NODEID"), "0")


@pytest.mark.parametrize(
    ("error", "lost"),
    [
        (RuntimeError("[/src/pair.cc:1] Connection closed by peer [127.0.0.1]"), True),
        (torch.distributed.DistNetworkError("the client socket has failed"), True),
        (RuntimeError("shapes do not fit"), False),
        (TrainingInterrupted(signal.SIGTERM, 6, "out/gloo"), False),
        (torch.OutOfMemoryError("out of memory; NCCL holds some"), False),
    ],
    ids=["gloo", "store", "another", "a signal, in a folder named so", "memory"],
)
def test_what_is_a_lost_process(error, lost):
    with pytest.raises(ProcessLost if lost else type(error)), lost_processes(Path("out/gloo"), 2):
        raise error


@pytest.mark.parametrize(
    ("changes", "variables", "message"),
    [
        ({"nodes": 2}, {}, "a run of 2 machines is started on each of them"),
        ({}, {"SLURM_STEP_NUM_TASKS": "4"}, "want 1 processes, and srun has started 4"),
        ({"devices": 2}, {"SLURM_NTASKS": "1"}, "want 2 processes, and srun has started 1"),
        (
            {"devices": 2},
            {
                "SLURM_NTASKS": "2",
                "SLURM_STEP_NUM_TASKS": "2",
                "SLURM_NTASKS_PER_NODE": "1",
            },
            "the number of tasks per node configured in SLURM",
        ),
        (
            {"devices": 2},
            {"SLURM_NTASKS": "2", "SLURM_STEP_NUM_TASKS": "2"},
            "Use `--ntasks-per-node=2`",
        ),
    ],
    ids=[
        "machines",
        "without --devices",
        "without srun",
        "on two machines",
        "without tasks a node",
    ],
)
def test_processes_that_nobody_starts(tmp_path, monkeypatch, changes, variables, message):
    """Not a run that waits for ever, and not several that write the same files."""
    for name, value in (variables and OF_SLURM | variables).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=message):
        train(TrainConfig(**SMALL, out=str(tmp_path / "run"), **changes))
    assert not (tmp_path / "run").exists()


def test_a_shell_that_srun_has_opened_may_train(tmp_path, monkeypatch):
    monkeypatch.setenv("SLURM_STEP_NUM_TASKS", "4")
    monkeypatch.setenv("SLURM_PTY_PORT", "1")
    assert train(TrainConfig(**SMALL, out=str(tmp_path))).rank == 0


def test_strategies_that_shard_weights_are_refused():
    """The norm of gradients would be that of a share of them."""
    chosen = TrainConfig(**SMALL)
    data = load_data(chosen)
    module = FlowModule(chosen, data, build(chosen, data))
    module._trainer = SimpleNamespace(world_size=2, global_rank=0, strategy=FSDPStrategy())
    with pytest.raises(ConfigError, match="by Lightning's strategy ddp, got FSDPStrategy"):
        module.setup("fit")


@pytest.mark.parametrize(
    ("variables", "threads"),
    [
        ({}, 2),
        ({"OMP_NUM_THREADS": "8"}, 8),
        ({"SLURM_CPUS_PER_TASK": "4", "SLURM_STEP_NUM_TASKS": "4"}, 4),
        ({"SLURM_CPUS_PER_TASK": "16", "SLURM_STEP_NUM_TASKS": "4"}, 8),
        ({"SLURM_CPUS_PER_TASK": "4"}, 2),  # a script that srun has not started
    ],
    ids=str,
)
def test_threads_of_each_of_four_processes(monkeypatch, variables, threads):
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 8)
    chosen = []
    monkeypatch.setattr(torch, "set_num_threads", chosen.append)
    with limited_threads(torch.nn.Linear(1000, 1000), 1000, (1000,), processes=4):
        pass
    assert chosen == [threads, 8]


def test_only_the_first_process_shows_a_bar(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    monkeypatch.setattr("pyflowkern.train.progress.DELAY", 0.0)
    for rank, shown in (("1", False), ("0", True)):
        monkeypatch.setenv("LOCAL_RANK", rank)
        with progress("read", 10) as advance:
            advance(10)
        assert ("read" in capsys.readouterr().err) == shown


def test_evaluations_leave_other_gpus_alone(monkeypatch):
    """On a machine with several; here none can be looked at."""
    chosen = TrainConfig(**SMALL)
    data = load_data(chosen)
    module = FlowModule(chosen, data, build(chosen, data))
    expected = module.held_out(module.model), score(module.model, data.validation[:128])
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    before = torch.get_rng_state()
    assert module.held_out(module.model) == expected[0]
    assert torch.equal(score(module.model, data.validation[:128]), expected[1])
    assert torch.equal(torch.get_rng_state(), before)
