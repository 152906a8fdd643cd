"""The trainer: exact resume, EMA, non-finite steps, stopping, the files of a run."""

import csv
import itertools
import math
import signal
import time

import fresh
import pytest
import torch
import yaml

from pyflowkern.data import DataSet
from pyflowkern.train import FlowModule, TrainConfig, TrainingDiverged, train
from pyflowkern.train.checkpoint import load_checkpoint, load_trained
from pyflowkern.train.config import ConfigError
from pyflowkern.train.data_model import DataModel
from pyflowkern.train.model import build, score
from pyflowkern.train.module import MovingAverage

TINY = {
    "data": "digits",
    "flow": "Glow",
    "flow_args": {"levels": 1, "steps": 1, "hidden": 4},
    "batch_size": 16,
    "steps": 12,
    "every": 4,
    "warmup": 2,
}


def config(out, **changes):
    return TrainConfig.create({**TINY, "out": str(out), **changes})


def vectors(rows=200):
    """Correlated data with a mean and scale far from the standard ones."""
    x = torch.randn(rows, 2, generator=torch.Generator().manual_seed(0))
    x = torch.stack([100 + 20 * x[:, 0], 0.3 * x[:, 0] + 0.01 * x[:, 1]], 1)
    return DataSet("vectors", x[20:], x[:20], mean=x[20:].mean(0), std=x[20:].std(0, correction=0))


def vector_config(out, **changes):
    return config(out, flow="RealNVP", flow_args={"steps": 2, "hidden": 8}, **changes)


def assert_same_run(left, right):
    """Assert equal checkpoints, optimiser states and metrics (without times), bit for bit."""
    a, b = load_checkpoint(left / "last.ckpt"), load_checkpoint(right / "last.ckpt")
    assert a["pyflowkern"]["progress"] == b["pyflowkern"]["progress"]
    assert a["state_dict"].keys() == b["state_dict"].keys()
    for name, tensor in a["state_dict"].items():
        assert torch.equal(tensor, b["state_dict"][name]), name
    for p, q in zip(*(c["optimizer_states"][0]["state"].values() for c in (a, b)), strict=True):
        assert all(torch.equal(p[key], q[key]) for key in p)
    assert metrics(left) == metrics(right)


def metrics(out):
    with (out / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    return [{k: v for k, v in row.items() if k != "seconds"} for row in rows]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "whole"
    return train(config(out))


def test_a_run_leaves_its_files_and_learns(finished):
    for name in (
        "last.ckpt",
        "best.ckpt",
        "config.yaml",
        "metrics.csv",
        "curve.png",
        "samples.png",
    ):
        assert (finished.out / name).stat().st_size, name
    assert list((finished.out / "tensorboard").glob("events*"))
    assert not list(finished.out.glob(".*")), "a temporary file stayed"
    assert [row["step"] for row in finished.history] == [0, 4, 8, 12]
    assert finished.history[-1]["held_out"] < finished.history[0]["held_out"]
    assert yaml.safe_load((finished.out / "config.yaml").read_text())["steps"] == 12


def test_a_checkpoint_reproduces_the_score_of_the_run(finished):
    trained = load_trained(finished.out)
    scores = score(trained.model, finished.module.data.validation, seed=0)
    # the same averaged weights, other dequantisation noise: 180 images of about 0.3 bits/dim spread
    assert float(scores.mean()) == pytest.approx(finished.history[-1]["held_out"], abs=0.02)


class Killed(Exception):
    pass


@pytest.mark.parametrize("at", [1, 4, 5, 10])
def test_resume_is_exact(finished, tmp_path, monkeypatch, at):
    step = FlowModule.training_step

    def die(self, batch, index):
        if self.step == at:
            raise Killed
        step(self, batch, index)

    monkeypatch.setattr(FlowModule, "training_step", die)
    with pytest.raises(Killed):
        train(config(tmp_path))
    monkeypatch.undo()
    torch.manual_seed(at)  # the state of the generators must not matter
    train(config(tmp_path), resume=True)
    assert_same_run(finished.out, tmp_path)


def test_resume_is_exact_for_a_flow_with_its_own_loss(tmp_path, monkeypatch):
    solver = {"hidden": [8], "method": "rk4", "step_size": 0.5}
    chosen = {"flow": "FlowMatching", "flow_args": solver, "steps": 4, "every": 2}
    whole = train(config(tmp_path / "whole", **chosen))
    step = FlowModule.training_step

    def die(self, batch, index):
        if self.step == 3:
            raise Killed
        step(self, batch, index)

    monkeypatch.setattr(FlowModule, "training_step", die)
    with pytest.raises(Killed):
        train(config(tmp_path / "cut", **chosen))
    monkeypatch.undo()
    train(config(tmp_path / "cut", **chosen), resume=True)
    assert_same_run(whole.out, tmp_path / "cut")


def test_resume_after_kill_9_is_exact(finished, tmp_path):
    code = (
        "import time, torch; from pyflowkern.train import FlowModule, TrainConfig, train\n"
        "torch.set_num_threads(1)\n"
        "step = FlowModule.training_step\n"
        "def slow(self, batch, index):\n"
        "    step(self, batch, index)\n"
        "    print(self.step, flush=True)\n"
        "    time.sleep(0.05)\n"
        "FlowModule.training_step = slow\n"
        f"train(TrainConfig.create({config(tmp_path).to_dict()!r}))\n"
    )
    with fresh.Process(code) as run:
        assert any(line.strip() == "7" for line in run.stdout)
        run.kill()
    assert run.returncode == -signal.SIGKILL
    assert load_checkpoint(tmp_path / "last.ckpt")["pyflowkern"]["progress"][0] == 4
    train(config(tmp_path), resume=True)
    assert_same_run(finished.out, tmp_path)


def test_resuming_a_finished_run_changes_nothing(finished):
    before = load_checkpoint(finished.out)["state_dict"]
    again = train(config(finished.out), resume=True)
    assert len(again.history) == 4
    after = load_checkpoint(finished.out)["state_dict"]
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_resume_refuses_other_data(finished, tmp_path):
    train(vector_config(tmp_path, steps=1), vectors())
    with pytest.raises(ValueError, match="other data"):
        train(vector_config(tmp_path, steps=1), vectors(300), resume=True)


def test_non_finite_steps_are_skipped_and_counted(tmp_path, monkeypatch):
    objective = DataModel.objective
    seen, steps = [], itertools.count()

    def some_bad(self, rows):
        loss, shown = objective(self, rows)
        if torch.is_grad_enabled() and next(steps) in (2, 3):
            seen.append({n: p.clone() for n, p in self.named_parameters()})
            return loss * math.nan, shown
        return loss, shown

    monkeypatch.setattr(DataModel, "objective", some_bad)
    run = train(config(tmp_path))
    assert run.history[-1]["skipped"] == 2
    assert all(torch.equal(seen[0][name], seen[1][name]) for name in seen[0]), "a step was taken"
    assert all(p.isfinite().all() for p in run.module.model.parameters())
    assert run.module.bad_in_a_row == 0
    assert math.isfinite(run.history[-1]["held_out"])


def test_training_stops_when_nothing_is_finite_any_more(tmp_path, monkeypatch):
    objective, steps = DataModel.objective, itertools.count()

    def bad_from_some_step_on(self, rows):
        loss, shown = objective(self, rows)
        return (loss / (next(steps) < 5) if torch.is_grad_enabled() else loss), shown

    monkeypatch.setattr(DataModel, "objective", bad_from_some_step_on)
    with pytest.raises(TrainingDiverged, match=r"stopped at step 8: .* in 3 steps in a row"):
        train(config(tmp_path, max_bad_steps=3))
    assert load_checkpoint(tmp_path)["pyflowkern"]["progress"] == [4, 0, 0]  # the last good state


def test_ema_is_the_documented_average():
    model = torch.nn.BatchNorm1d(1)  # weights and buffers, a count among them
    average = MovingAverage(model, decay=0.7)
    expected = 0.0
    for n in range(40):
        with torch.no_grad():
            model.weight.fill_(float(n))
        model.running_mean = torch.tensor([float(n)])  # a new tensor, as .to() makes it
        model.num_batches_tracked += 1
        average.update()
        decay = min(0.7, (1 + n) / (10 + n)) if n else 0.0
        expected = decay * expected + (1 - decay) * n
    assert average.module.weight.item() == pytest.approx(expected, rel=1e-6)
    assert float(average.module.running_mean) == 39
    assert int(average.module.num_batches_tracked) == 40
    assert average.module.running_mean is not model.running_mean


def test_the_average_is_that_of_torch_and_has_its_state():
    model = torch.nn.Linear(3, 2)

    def warm(averaged, current, seen):
        n = float(seen)
        torch._foreach_lerp_(averaged, current, 1 - min(0.9, (1 + n) / (10 + n)))

    theirs = torch.optim.swa_utils.AveragedModel(model, multi_avg_fn=warm)
    ours = MovingAverage(model, decay=0.9)
    for _ in range(5):
        with torch.no_grad():
            model.weight.normal_()
        theirs.update_parameters(model)
        ours.update()
    expected, state = theirs.state_dict(), ours.state_dict()
    assert expected.keys() == state.keys(), "checkpoints of earlier versions would not load"
    assert all(torch.equal(expected[name], state[name]) for name in state)


def test_loading_gives_the_averaged_weights(finished):
    module, trained = finished.module, load_trained(finished.out)
    pairs = zip(module.model.parameters(), module.averaged.module.parameters(), strict=True)
    assert any(not torch.equal(p, q) for p, q in pairs)
    for p, q in zip(trained.model.parameters(), module.averaged.module.parameters(), strict=True):
        assert torch.equal(p, q)


def test_early_stopping(tmp_path):
    run = train(config(tmp_path, steps=40, lr=1e-12, patience=2))
    assert run.history[-1]["step"] < 40


def test_time_limit(tmp_path):
    start = time.monotonic()
    run = train(config(tmp_path, steps=100_000, minutes=0.01))
    assert run.history[-1]["step"] < 100_000
    assert time.monotonic() - start < 60


def test_bf16(tmp_path):
    run = train(config(tmp_path, precision="bf16-mixed"))
    assert run.history[-1]["held_out"] < run.history[0]["held_out"]
    assert all(p.dtype == torch.float32 for p in run.module.model.parameters())


def test_vectors_are_modelled_in_their_own_units(tmp_path):
    data = vectors()
    model = build(vector_config(tmp_path), data).eval()
    x = data.validation
    z, log_det = model(x)
    back, inverse_log_det = model.inverse(z)
    torch.testing.assert_close(back, x, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(inverse_log_det, -log_det, rtol=1e-5, atol=1e-5)
    jacobian = torch.stack(
        [torch.autograd.functional.jacobian(lambda r: model(r[None])[0][0], row) for row in x]
    )
    expected = torch.linalg.slogdet(jacobian.double()).logabsdet
    torch.testing.assert_close(log_det.double(), expected, rtol=1e-4, atol=1e-4)
    normal = -0.5 * (z**2).sum(1) - math.log(2 * math.pi)
    torch.testing.assert_close(model.log_prob(x), normal + log_det, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("flow", "arguments"),
    [
        ("MAF", {"transforms": 2, "hidden": 8}),
        ("IAF", {"transforms": 2, "hidden": [8, 8]}),
        ("NSF", {"transforms": 2, "hidden": 8, "bins": 4}),
        ("NSF", {"transforms": 1, "hidden": 8, "autoregressive": True}),
    ],
)
def test_every_flow_of_vectors_trains_by_its_name(tmp_path, flow, arguments):
    run = train(config(tmp_path, flow=flow, flow_args=arguments), vectors())
    assert run.history[-1]["held_out"] < run.history[0]["held_out"]
    trained = load_trained(tmp_path)
    assert trained.model.sample(3).shape == (3, 2)


def test_spline_flow_of_images_trains_by_its_name(tmp_path):
    run = train(config(tmp_path, flow="NSF", flow_args={"levels": 1, "steps": 1, "hidden": 4}))
    assert run.history[-1]["held_out"] < run.history[0]["held_out"]


def test_a_flow_of_angles_does_not_fit_standardised_columns(tmp_path):
    with pytest.raises(
        ConfigError, match=r"NSF .* from -3\.142 to 3\.142, .* leave out tails and circular"
    ):
        build(config(tmp_path, flow="NSF", flow_args={"circular": True}), vectors())
