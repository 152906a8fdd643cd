"""Models that bring a loss along are trained, shown and timed by it."""

import pytest
import torch

from pyflowkern import nn
from pyflowkern.data import DataSet, PairSet
from pyflowkern.flows import ContinuousBijection
from pyflowkern.train import TrainConfig, measure, train
from pyflowkern.train.config import ConfigError
from pyflowkern.train.inference import evaluate_checkpoint


def config(out, **changes):
    options = {"batch_size": 16, "steps": 4, "every": 2, "warmup": 2, "out": str(out)}
    return TrainConfig.create(options | changes)


def test_a_flow_with_its_own_loss_is_shown_and_timed_by_it(tmp_path, monkeypatch):
    """No ODE is solved in training or in the steps that are timed; pictures and evaluations of the run solve some."""
    solves = []
    solve = ContinuousBijection.integrate
    monkeypatch.setattr(
        ContinuousBijection, "integrate", lambda *a, **k: solves.append(1) or solve(*a, **k)
    )
    solver = {"hidden": [8], "method": "rk4", "step_size": 0.5}
    table = tmp_path / "rows.csv"
    chosen = config(tmp_path / "run", data=str(table), flow="FlowMatching", flow_args=solver)
    rows = 5 + 3 * torch.randn(60, 2, generator=torch.Generator().manual_seed(0))
    table.write_text("\n".join(f"{a},{b}" for a, b in rows.tolist()))
    run = train(chosen)
    measure.step_seconds(chosen, run.module.data, blocks=1)
    assert not solves
    assert run.module.unit == "loss"
    # of standardised data and a field that is nearly zero: E |x1 - x0|^2 = 2 per element
    first = run.history[0]
    assert 1 < first["train"] < 3
    assert 1 < first["held_out"] < 3
    assert evaluate_checkpoint(tmp_path / "run")["unit"] == "nats"
    assert solves


def test_the_timed_step_is_the_training_step(tmp_path):
    """Also of a bridge, which has no log_prob of rows."""
    moments = {"mean": torch.zeros(2), "std": torch.ones(2)}
    data = DataSet("vectors", torch.randn(64, 2), torch.randn(8, 2), **moments)
    pairs = PairSet("pairs", torch.randn(64, 2, 2), torch.randn(8, 2, 2), **moments)
    for flow, args, rows in (
        ("NSF", {"transforms": 1}, data),
        ("SchrodingerBridge", {"hidden": [8]}, pairs),
    ):
        chosen = config(tmp_path, flow=flow, flow_args=args)
        assert min(measure.step_seconds(chosen, rows, blocks=1)) > 0


def test_a_u_net_is_trained_on_images_by_its_name(tmp_path):
    chosen = {"hidden": [4, 4], "conv": "unet", "method": "midpoint", "step_size": 0.5}
    run = train(config(tmp_path, data="digits", flow="FlowMatching", flow_args=chosen, every=4))
    assert isinstance(next(run.module.model.flow.blocks()).field, nn.VectorFieldUNet)
    assert run.history[-1]["held_out"] < run.history[0]["held_out"]
    assert (tmp_path / "samples.png").is_file()


def test_the_data_of_a_run_decide_its_classes(tmp_path):
    chosen = config(tmp_path, data="digits", flow="FlowMatching", flow_args={"classes": 1})
    with pytest.raises(ConfigError, match="FlowMatching takes no argument 'classes'"):
        train(chosen)
    chosen = config(
        tmp_path, data="digits", flow="FlowMatching", flow_args={"context_dropout": 0.1}
    )
    with pytest.raises(ConfigError, match=r"cannot be built .* context_dropout"):
        train(chosen)
