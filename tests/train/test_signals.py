"""A run that a signal ends writes a checkpoint and a line, exits as a shell reports it, and resumes exactly."""

import os
import re
import signal
import threading

import fresh
import numpy as np
import pytest
import torch

from pyflowkern.train import FlowModule, TrainConfig, TrainingInterrupted, train
from pyflowkern.train.checkpoint import load_checkpoint
from pyflowkern.train.signals import StopSignals

OPTIONS = {
    "flow": "RealNVP",
    "flow_args": {"steps": 1, "hidden": 4},
    "steps": 12,
    "every": 4,
    "warmup": 2,
    "batch_size": 8,
}
#: The command line, slowed down, printing each step.
SLOW = """
import signal, sys, time; from pyflowkern.train import FlowModule
# whoever runs the tests in the background may ignore these signals, and the run would then, too
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)
step = FlowModule.training_step
def slow(self, batch, index):
    step(self, batch, index)
    print("taken", self.step, flush=True)
    time.sleep(0.2)
FlowModule.training_step = slow
sys.argv[0] = "pyflowkern"
from pyflowkern.cli import main
main()
"""


@pytest.fixture(scope="module")
def table(tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "t.csv"
    np.savetxt(path, np.random.default_rng(0).normal(size=(60, 2)), delimiter=",")
    return path


@pytest.fixture
def config(table):
    return lambda out: TrainConfig.create({**OPTIONS, "data": str(table), "out": str(out)})


@pytest.fixture(scope="module")
def whole(table, tmp_path_factory):
    """The checkpoint and the metrics of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    run = train(TrainConfig.create({**OPTIONS, "data": str(table), "out": str(out)}))
    return load_checkpoint(out), rows(run.history)


def rows(history):
    return [{k: v for k, v in row.items() if k != "seconds"} for row in history]


def assert_same(whole, out, history):
    checkpoint, metrics = whole
    resumed = load_checkpoint(out)
    for name, tensor in checkpoint["state_dict"].items():
        assert torch.equal(tensor, resumed["state_dict"][name]), name
    states = [c["optimizer_states"][0]["state"].values() for c in (checkpoint, resumed)]
    for p, q in zip(*states, strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)
    assert rows(history) == metrics


@pytest.mark.parametrize(
    ("name", "code", "at"), [("SIGTERM", 143, 6), ("SIGINT", 130, 3), ("SIGHUP", 129, 4)]
)
def test_a_signal_writes_a_checkpoint_says_so_and_the_run_goes_on(
    name, code, at, config, whole, tmp_path
):
    out = tmp_path / "run"
    config(out)
    (tmp_path / "run.yaml").write_text(config(out).to_yaml())
    with fresh.Process(SLOW, "train", tmp_path / "run.yaml") as run:
        assert any(line == f"taken {at}\n" for line in run.stdout)
        os.kill(run.pid, getattr(signal, name))
        _, message = run.communicate()
    assert run.returncode == code, message
    step = load_checkpoint(out)["pyflowkern"]["progress"][0]
    assert step in (at, at + 1)  # the signal may come while the next step begins
    expected = f"pyflowkern: stopped by {name} after step {step}; go on with: pyflowkern train --resume {out}\n"
    assert message == expected
    assert_same(whole, out, train(config(out), resume=True).history)


@pytest.mark.parametrize("at", [1, 4, 6, 11])
def test_a_run_stopped_after_any_step_goes_on_exactly(at, config, whole, tmp_path, monkeypatch):
    step = FlowModule.training_step

    def stopped(self, batch, index):
        step(self, batch, index)
        if self.step == at:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FlowModule, "training_step", stopped)
    with pytest.raises(TrainingInterrupted, match=f"stopped by SIGTERM after step {at};"):
        train(config(tmp_path))
    monkeypatch.undo()
    assert load_checkpoint(tmp_path)["pyflowkern"]["progress"][0] == at
    assert (tmp_path / "curve.png").stat().st_size
    assert_same(whole, tmp_path, train(config(tmp_path), resume=True).history)


def test_a_signal_in_the_last_step_lets_the_run_end(config, whole, tmp_path, monkeypatch):
    step = FlowModule.training_step

    def stopped(self, batch, index):
        step(self, batch, index)
        if self.step == OPTIONS["steps"]:
            os.kill(os.getpid(), signal.SIGTERM)

    monkeypatch.setattr(FlowModule, "training_step", stopped)
    assert_same(whole, tmp_path, train(config(tmp_path)).history)


def test_the_handlers_of_the_caller_come_back(config, tmp_path):
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = [signal.getsignal(number) for number in numbers]
    train(config(tmp_path))
    assert [signal.getsignal(number) for number in numbers] == before


def test_an_ignored_signal_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    signals = StopSignals()
    try:
        signals.install()
        os.kill(os.getpid(), signal.SIGHUP)
        assert signals.received is None
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.received is signal.SIGTERM
        assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL, "a second one must end at once"
    finally:
        signals.restore()
        signal.signal(signal.SIGHUP, before)


def test_training_in_a_thread_needs_no_handlers(config, whole, tmp_path):
    found = []

    def work():
        found.append(train(config(tmp_path)).history)

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert_same(whole, tmp_path, *found)


def test_ctrl_c_before_training_is_one_line(tmp_path):
    code = "import os, signal; from pyflowkern.train import runner\n"
    code += "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
    code += "def load(*a, **k): os.kill(os.getpid(), signal.SIGINT); import time; time.sleep(9)\n"
    code += "runner.load_data = load; import sys; sys.argv[0] = 'pyflowkern'\n"
    code += "from pyflowkern.cli import main; main()"
    run = fresh.run(code, "train", "--data", "digits", "--out", tmp_path / "r")
    assert run.returncode == 130
    assert re.fullmatch(r"\n?pyflowkern: interrupted\n", run.stderr)
    assert not (tmp_path / "r").exists()
