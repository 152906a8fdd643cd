"""Several processes train as one does: the same curve, one set of files, one end; and a run goes on after a loss."""

import csv
import os
import re
import signal
import socket
import subprocess
import sys
import time
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import ranks
import torch
from lightning.pytorch import Trainer

import pyflowkern
from pyflowkern.nn import ActNorm
from pyflowkern.nn._again import Call
from pyflowkern.train import FlowModule, TrainConfig, TrainingInterrupted, train
from pyflowkern.train.bridges import load_data
from pyflowkern.train.checkpoint import load_checkpoint
from pyflowkern.train.config import ConfigError
from pyflowkern.train.data_model import DataModel
from pyflowkern.train.model import build

FIXED = {"method": "rk4", "step_size": 0.5, "divergence": "exact"}
COMMON = {"steps": 8, "every": 4, "warmup": 2, "lr": 5e-3}
#: A batch of 15 rows is one of 7 and one of 8; a flow of one dimension has weights that no gradient reaches; of 300
#: held-out rows, in parts of 128, two processes have 172 and 128.
RUNS = {
    "uneven shares": {
        "flow": "NSF",
        "flow_args": {"transforms": 2, "hidden": [8], "autoregressive": True, "mixing": "none"},
        "batch_size": 15,
    },
    "streamed": {
        "data": "t.npy",
        "stream": "always",
        "flow": "NSF",
        "flow_args": {"transforms": 2, "hidden": [8], "mixing": "none"},
        "batch_size": 15,
    },
    "idle weights": {
        "data": "one.csv",
        "flow": "NSF",
        "flow_args": {"transforms": 2, "hidden": [8], "mixing": "none"},
        "batch_size": 16,
    },
    "continuous": {"flow": "CNF", "flow_args": {"hidden": [8], **FIXED}, "batch_size": 16},
    "actnorm": {"flow": "RealNVP", "flow_args": {"steps": 2, "hidden": 8}, "batch_size": 15},
    "batch norm": {
        "flow": "MAF",
        "flow_args": {"transforms": 2, "hidden": [8], "batch_norm": True},
        "batch_size": 16,
    },
    "reversible": {
        "flow": "RealNVP",
        "flow_args": {
            "steps": 2,
            "hidden": 300,
            "memory": "reversible",
        },  # no op replaces them
        "lr": 5e-4,  # so many weights, and larger steps make much of rounding
        "batch_size": 15,
    },
    "pixels": {
        "data": "digits",
        "flow": "Glow",
        "flow_args": {"levels": 1, "steps": 2, "hidden": 8},
        "batch_size": 64,
    },
    "flow matching": {
        "flow": "FlowMatching",
        "flow_args": {"hidden": [8], "method": "rk4", "step_size": 0.5},
        "batch_size": 256,
    },
    "bridge": {  # whose networks are trained in turns
        "data": TrainConfig().data,
        "data0": "t.csv",
        "data1": "other.csv",
        "flow": "SchrodingerBridge",
        "flow_args": {"method": "dsbm_ipf", "hidden": [8], "steps": 4, "iteration_calls": 3},
        "batch_size": 256,
    },
}
#: How far training and held-out scores may lie from those of one process, relatively: by rounding; by what Adam makes
#: of it in layers that begin where their gradient is zero, and so is nothing but rounding; by other draws of noise.
ROUNDING, FROM_ZERO = (1e-6, 1e-6), (2e-3, 2e-3)
CLOSE = dict.fromkeys(("actnorm", "batch norm", "reversible"), FROM_ZERO)
CLOSE |= {"pixels": (5e-3, 2e-3), "flow matching": (0.2, 5e-3), "bridge": (0.5, 0.1)}


def config(folder, name, out, **changes):
    options = {"data": "t.csv", "out": str(out), **COMMON, **RUNS[name], **changes}
    for key in ("data", "data0", "data1"):
        if options.get(key, "").endswith((".csv", ".npy")):
            options[key] = str(folder / options[key])
    return TrainConfig.create(options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with a table of 3,000 rows, of two columns that depend on each other."""
    folder = tmp_path_factory.mktemp("ranks")
    x = np.random.default_rng(0).normal(size=(3000, 2))
    x[:, 1] = 5 + 3 * x[:, 0] + 0.1 * x[:, 1]
    np.save(folder / "t.npy", x)
    np.savetxt(folder / "t.csv", x, delimiter=",", fmt="%.6g")
    np.savetxt(folder / "other.csv", 2 * x, delimiter=",", fmt="%.6g")
    np.savetxt(folder / "one.csv", x[:, 1:], delimiter=",", fmt="%.6g")
    return folder


def metrics(out):
    with (Path(out) / "metrics.csv").open() as file:
        return [
            {k: float(v) for k, v in row.items() if k != "seconds"} for row in csv.DictReader(file)
        ]


def assert_same_bits(left, right):
    """Assert equal weights, states of the optimizer and metrics of two runs."""
    a, b = load_checkpoint(left), load_checkpoint(right)
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    for p, q in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)
    assert metrics(left) == metrics(right)


# --- what runs in two processes ---------------------------------------------------------------------


def processes(folder):
    """All runs of RUNS, and those whose ends all processes must agree on."""
    folder, rank = Path(folder), int(os.environ["RANK"])
    for name in RUNS:
        with counted_again() as again:
            run = train(config(folder, name, folder / "two" / name))
        assert bool(again) == (name == "reversible")
        assert run.rank == rank
        assert rank == 0 or [row["step"] for row in run.history] == [0, 4, 8]
        # the trained flow is one process's own, whose next training step waits for no other
        assert not any(getattr(m, "process_group", None) for m in run.module.modules())
    in_a_trainer_of_its_own(folder, rank)
    other_data(folder, rank)
    one_bad_loss(folder, rank)
    a_signal_to_one(folder, rank)
    with pytest.raises(ConfigError, match="a batch of 1 rows is too small for 2 processes"):
        train(config(folder, "uneven shares", folder / "two" / "tiny", batch_size=1))


@contextmanager
def counted_again():
    """Give the block a list that has an item for each layer that is run again in a backward pass."""
    again, original = [], Call.again

    def noted(*given):
        again.append(1)
        return original(*given)

    Call.again = noted
    try:
        yield again
    finally:
        Call.again = original


def in_a_trainer_of_its_own(folder, rank):
    """The module under Lightning's ddp as it is: each process has its rows, and all have the same weights."""
    chosen = config(folder, "actnorm", folder / "unused", every=2)
    data = load_data(chosen)
    module = FlowModule(chosen, data, build(chosen, data))
    given, *others = (m for m in module.model.modules() if isinstance(m, ActNorm))
    given.process_group = torch.distributed.group.WORLD  # a group of the user's stays
    off = ("logger", "enable_checkpointing", "enable_model_summary", "enable_progress_bar")
    options = {"strategy": "ddp", "accelerator": "cpu", "devices": 2, "max_epochs": 1}
    trainer = Trainer(**options, **dict.fromkeys(off, False))
    trainer.fit(module)
    assert module.step == 2
    assert given.process_group
    assert not any(layer.process_group for layer in others)
    assert set(trainer.callback_metrics) == {"held_out"}
    found = [None, None]
    weights = {name: t.tolist() for name, t in module.state_dict().items()}
    torch.distributed.all_gather_object(found, (module.batches.batch(0).tolist(), weights))
    assert not any(row in found[1][0] for row in found[0][0])
    assert found[0][1] == found[1][1]


def other_data(folder, rank):
    """Processes that have read other files say so before they train."""
    chosen = config(folder, "uneven shares", folder / "unused")
    with pytest.raises(ConfigError, match="has another checksum of the data"):
        train(replace(chosen, data=str(folder / ("other.csv" if rank else "t.csv"))))


def one_bad_loss(folder, rank):
    """A loss that is not finite in one process is skipped by all."""
    objective = DataModel.objective

    def bad(self, rows):
        loss, shown = objective(self, rows)
        if torch.is_grad_enabled() and rank == 1 and module_step() == 2:
            return loss * torch.inf, shown
        return loss, shown

    step, at = FlowModule.training_step, []

    def noted(self, batch, index):
        at.append(self.step)
        step(self, batch, index)

    def module_step():
        return at[-1] if at else -1

    FlowModule.training_step, DataModel.objective = noted, bad
    try:
        run = train(config(folder, "uneven shares", folder / "two" / "bad"))
    finally:
        FlowModule.training_step, DataModel.objective = step, objective
    assert run.history[-1]["skipped"] == 1


def a_signal_to_one(folder, rank):
    """A signal to one process ends all after the same step, and the run goes on exactly."""
    step = FlowModule.training_step

    def stopped(self, batch, index):
        step(self, batch, index)
        if self.step == 5 and rank == 1:
            os.kill(os.getpid(), signal.SIGTERM)

    chosen = config(folder, "uneven shares", folder / "two" / "stopped")
    FlowModule.training_step = stopped
    end = {0: (TrainingInterrupted, "stopped by SIGTERM after step 6;"), 1: (SystemExit, "0")}
    with pytest.raises(end[rank][0], match=end[rank][1]):
        train(chosen)
    FlowModule.training_step = step
    train(chosen, resume=True)


def four(folder):
    """More processes than parts of held-out rows."""
    train(config(Path(folder), "uneven shares", Path(folder) / "four"))


def slowly(folder, out):
    """Train, printing each step."""
    step = FlowModule.training_step

    def slow(self, batch, index):
        step(self, batch, index)
        print("taken", self.step, flush=True)
        time.sleep(0.05)

    FlowModule.training_step = slow
    sys.argv = ["pyflowkern", "train", str(Path(folder) / "run.yaml"), "--out", out]
    from pyflowkern.cli import main

    main()


# --- the tests --------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def two(folder):
    """The folder of the runs of two processes."""
    printed = ranks.run(__file__, "processes", 2, folder)
    assert printed[1] == "", "the second process said something"
    assert printed[0].count("step      8/8") == len(RUNS) + 2
    return folder / "two"


@pytest.mark.parametrize("name", RUNS)
def test_two_processes_have_the_curve_of_one(folder, two, name):
    train(config(folder, name, folder / "one" / name))
    found, expected = metrics(two / name), metrics(folder / "one" / name)
    assert [row["step"] for row in found] == [0, 4, 8]
    for row, wanted in zip(found, expected, strict=True):
        for key, close in zip(("train", "held_out"), CLOSE.get(name, ROUNDING), strict=True):
            assert row[key] == pytest.approx(wanted[key], rel=close), (key, row["step"])
    if name not in (
        "pixels",
        "flow matching",
        "bridge",
    ):  # layers have started from the whole batch
        assert found[0] == pytest.approx(expected[0], rel=1e-6)
    if name not in ("actnorm", "batch norm", "reversible", "pixels"):  # of the same weights
        assert found[0]["held_out"] == expected[0]["held_out"], "the same bits"
    assert load_checkpoint(two / name)["pyflowkern"]["config"]["devices"] == 2


def test_four_processes_have_it_too(folder, two):
    ranks.run(__file__, "four", 4, folder)
    for row, wanted in zip(metrics(folder / "four"), metrics(two / "uneven shares"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)


def test_processes_agree_on_the_end(two):
    assert_same_bits(two / "stopped", two / "uneven shares")
    assert not (two / "tiny").exists()


def test_a_process_that_is_killed_ends_the_others_and_the_run_goes_on(folder, two, tmp_path):
    chosen = config(folder, "uneven shares", "unused")
    (folder / "run.yaml").write_text(chosen.to_yaml())
    out = tmp_path / "run"
    with ExitStack() as stack:
        first, second = ranks.start(stack, __file__, "slowly", 2, folder, out)
        assert any(line == "taken 6\n" for line in second.stdout)
        second.kill()
        begin = time.monotonic()
        _, message = first.communicate()
    assert time.monotonic() - begin < 30
    assert first.returncode == 1
    assert re.fullmatch(
        rf"pyflowkern: another process of the run ended \([^/]*\); go on with: pyflowkern train --resume {out}\n",
        message,
    )
    assert load_checkpoint(out)["pyflowkern"]["progress"][0] == 4
    train(config(folder, "uneven shares", out), resume=True)  # in one process
    for row, wanted in zip(metrics(out), metrics(two / "uneven shares"), strict=True):
        assert row == pytest.approx(wanted, rel=1e-6)


ENVIRONMENT = {
    **{k: v for k, v in os.environ.items() if k not in ("RANK", "WORLD_SIZE", "LOCAL_RANK")},
    "PYTHONPATH": str(Path(pyflowkern.__file__).parents[1]),
    "OMP_NUM_THREADS": "1",
}


@pytest.mark.slow
@pytest.mark.parametrize("how", ["torchrun", "machines", "devices"])
def test_the_command_line_starts_processes(folder, two, tmp_path, how):
    """What forks cannot show: processes of torchrun, on what are two machines to it, too, and of Lightning."""
    chosen = config(folder, "uneven shares", tmp_path / "run")
    (tmp_path / "run.yaml").write_text(chosen.to_yaml())
    package = ["-m", "pyflowkern", "train", str(tmp_path / "run.yaml")]
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node"]
    if how == "torchrun":
        commands = [[*torchrun, "2", "--standalone", *package]]
    elif how == "machines":
        with socket.socket() as place:
            place.bind(("127.0.0.1", 0))
            meet = f"127.0.0.1:{place.getsockname()[1]}"
        there = ["--nnodes", "2", "--rdzv-backend", "c10d", "--rdzv-endpoint", meet]
        commands = [[*torchrun, "1", *there, "--local-addr", "127.0.0.1", *package]] * 2
    else:
        commands = [[*package, "--devices", "2"]]
    options = {"env": ENVIRONMENT, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    started = [subprocess.Popen([sys.executable, *c], text=True, **options) for c in commands]
    said = [process.communicate() for process in started]
    assert not any(process.returncode for process in started), said
    printed = "".join(out for out, _ in said)
    assert printed.count("metrics.csv") == printed.count("step      8/8") == 1
    assert "plots" not in "".join(
        e for _, e in said
    )  # none failed, and the first process alone has drawn
    assert (tmp_path / "run" / "pairs.png").stat().st_size > 5000
    assert_same_bits(tmp_path / "run", two / "uneven shares")
