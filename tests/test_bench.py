"""The benchmark harness: its statistics, its checks and the form of its results."""

import csv
import json
import math
import mmap
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package

from bench import _busy, _environment, _memory, _papers, _plot, _processes, _report, _steps
from bench._case import Case, Lazy, random_inputs
from bench._harness import Row, run_case
from bench._html import write_page
from bench._scaling import plot_scaling
from bench._timing import Plan, percentiles

CPU = torch.device("cpu")
PLAN = Plan(device=CPU, cache_bytes=1 << 16, rounds=5, seconds=0.1)


def scaled(x, inverse=False, factor=2.0):
    return x / factor if inverse else x * factor


def missing(inputs):
    import a_library_that_nobody_installed  # noqa: F401


def tiny(**options):
    providers = {
        "eager": scaled,
        "ours": scaled,
        "wrong": partial(scaled, factor=2.1),
        "other": Lazy(lambda inputs: partial(scaled, factor=3.0), comparable=False),
        "absent": Lazy(missing),
    }
    make = random_inputs(x=(64, 32))
    return Case("tiny", make, providers, compiles=False, **options)


def test_percentiles_interpolate():
    assert percentiles([3.0]) == (3.0, 3.0, 3.0)
    assert percentiles([float(i) for i in range(11)]) == pytest.approx((2.0, 5.0, 8.0))


def test_only_providers_that_agree_are_timed():
    rows = run_case(tiny(), PLAN)
    status = {(row.pass_, row.provider): row.status for row in rows}
    for pass_ in ("forward", "forward+backward", "inverse", "inverse+backward"):
        assert status[pass_, "eager"] == status[pass_, "ours"] == status[pass_, "floor"] == "ok"
        assert status[pass_, "other"] == "ok"
        assert "differs by" in status[pass_, "wrong"]
        assert status[pass_, "absent"].startswith("not installed")
    for row in rows:
        if row.status == "ok" and row.metric == "ms":
            assert 0 < row.p20 <= row.p50 <= row.p80
        elif row.status != "ok":
            assert math.isnan(row.p50)


@pytest.mark.parametrize(
    ("wrong", "value", "status"), [(2, 9.0, "ok"), (3, 9.0, "differs"), (1, math.nan, "differs")]
)
def test_a_thousandth_of_the_numbers_may_differ(wrong, value, status):
    """Points that rounding puts into the next bin of a spline; but nothing that is not a number."""

    def almost(x):
        return x.clone().index_fill(0, torch.arange(wrong), value)

    providers = {"eager": torch.clone, "ours": almost}
    case = Case("almost", random_inputs(x=(2048,)), providers, passes=("forward",), compiles=False)
    found = {row.provider: row.status for row in run_case(case, PLAN)}
    assert found["ours"].split(" by ")[0].endswith(status)


def test_a_random_eager_is_not_compared_with():
    def noisy(x):
        return x + torch.rand_like(x)

    make = random_inputs(x=(64, 32))
    providers = {"eager": noisy, "ours": noisy}
    case = Case("noise", make, providers, passes=("forward",), compiles=False)
    assert {row.status for row in run_case(case, PLAN)} == {"ok"}


def test_page_faults_of_a_whole_step_are_counted():
    pages = 256

    def fresh(x):
        block = mmap.mmap(-1, pages * mmap.PAGESIZE)
        for i in range(pages):
            block[i * mmap.PAGESIZE] = 1
        return x * 2

    providers = {"eager": lambda x: x * 2, "ours": fresh}
    case = Case("faults", random_inputs(x=(4,)), providers, passes=("call",), compiles=False)
    faults = {row.provider: row.p50 for row in run_case(case, PLAN) if row.metric == "faults"}
    assert faults["eager"] < 10
    assert faults["ours"] >= pages


def test_memory_counts_what_is_kept():
    square = {"eager": torch.square, "ours": torch.square}
    make = random_inputs(input=(64, 32))
    case = Case("square", make, square, passes=("forward+backward",), compiles=False)
    kept = [row.p50 for row in run_case(case, PLAN) if row.pass_ == "kept for backward"]
    assert kept == [64 * 32 * 4 / 2**20] * 2
    case = replace(case, parameters=("input",))
    assert [row.p50 for row in run_case(case, PLAN) if row.pass_ == "kept for backward"] == [0, 0]


def test_results_have_the_documented_columns(tmp_path):
    targets = {"forward vs eager": 1e-9, "inverse vs floor": 1.0, "forward vs unasked": 1.0}
    case = tiny(passes=("forward",), targets=targets)
    rows = run_case(case, PLAN)
    for row in rows:
        row.noisy = False  # even if this machine is busy
    verdicts = [met for _, met in _report.check_targets(case, rows)]
    assert verdicts == [True, None, None]
    for row in rows:
        row.noisy = True
    assert [met for _, met in _report.check_targets(case, rows)] == [None] * 3
    assert "| forward (ms) | ours (reference) |" in _report.table(rows)
    facts = _environment.describe(CPU)
    paths = _report.write(tmp_path, "tiny", _report.records("tiny", rows, facts))
    with paths[0].open() as file:
        found = list(csv.DictReader(file))
    assert list(found[0]) == [*_report.COLUMNS, *facts]
    assert {row["provider"] for row in found} == {
        "floor",
        "eager",
        "ours",
        "wrong",
        "other",
        "absent",
    }


def test_a_page_has_every_number_and_picture_and_needs_no_other_file(tmp_path):
    rows = run_case(tiny(), PLAN)
    rows.append(replace(rows[0], case="a < b", provider="<them>"))
    files = _report.write(tmp_path, "tiny", _report.records("tiny", rows, {"device": "x & y"}))
    (tmp_path / "tiny.png").write_bytes(b"picture")
    (tmp_path / "own.md").write_text("# Title\n\n| K | MiB |\n|---|---|\n| 4 | 8.1 |\n\nwords\n")
    write_page(tmp_path / "deep" / "page.html", [*files, tmp_path / "own.md"])
    page = (tmp_path / "deep" / "page.html").read_text()
    for record in json.loads((tmp_path / "tiny.json").read_text()):
        assert (f">{record['p50']:.3g}<" if record["status"] == "ok" else record["status"]) in page
    assert (
        page.count("<tr") == len(rows) + 2 + 2
    )  # the heads of two cases, and the table of own.md
    assert "&lt;them&gt;" in page
    assert "<them>" not in page
    assert "x &amp; y" in page
    assert "data:image/png;base64,cGljdHVyZQ==" in page
    assert '<td class="name">8.1</td>' in page
    assert "http" not in page


@pytest.mark.parametrize("name", _steps.models())
def test_training_steps_move_every_parameter(name):
    step = _steps.Step(_steps.models()[name], CPU, False)
    before = {k: p.detach().clone() for k, p in step.flow.named_parameters()}
    for _ in range(3):  # last layers start at zero, so those before them move one step later
        step()
    for k, p in step.flow.named_parameters():
        assert p.isfinite().all(), k
        assert not torch.equal(p, before[k]), k


def test_scaling_is_drawn_where_cases_differ_only_in_a_number(tmp_path):
    rows = [Row(f"one layer D={d}", "ours", "call", "float32", p50=float(d)) for d in (8, 16, 32)]
    picture = tmp_path / "scaling.png"
    assert not plot_scaling(picture, "title", rows)
    rows.append(Row("one layer D=64", "ours", "call", "float32", p50=64.0))
    assert plot_scaling(picture, "title", rows)
    assert picture.stat().st_size > 1000


def test_bars_of_a_case_lie_side_by_side_and_cases_apart():
    rows = [Row(case, who, "call", "float32") for case, who in (("a", "zuko"), ("a", "ours"))]
    rows += [Row("b", "ours", "forward", "float64"), Row("b", "ours", "inverse", "float64")]
    places, middles = _plot._places(rows, ["ours", "compile", "zuko"])
    assert places == {("a", "ours"): 1, ("a", "zuko"): 2, ("b float64", "ours"): 4}
    assert middles == {"a": 1.5, "b float64": 4}


def test_pictures_are_drawn_again_from_what_was_written(tmp_path):
    facts = {"device": "x", "threads": 2}
    rows = [Row("one", who, "call", "float32", "ms", 1.0, 2.0, 3.0) for who in ("eager", "ours")]
    rows[1].speedup_vs_eager, rows[1].noisy = 2.5, True
    written = _report.write(tmp_path, "tiny", _report.records("tiny", rows, facts))
    again, shared = _report.read(written[1])
    assert repr(again) == repr(rows)  # nan is not nan
    assert shared == {"family": "tiny", **facts}
    assert _plot.plot(tmp_path / "tiny.png", "title", again)
    assert not _plot.plot(tmp_path / "none.png", "title", again[:1])


def test_curves_of_processes_are_compared():
    one = {"step": [0, 4, 8], "seconds": [0, 1, 1.5], "train": [3, 2, 1], "held_out": [3, 2.5, 2]}
    other = one | {"held_out": [3, 2.5, 2.25]}
    assert _processes._difference(one, other) == 0.25
    assert _processes._milliseconds(one) == 125
    rows = [
        {"run": "a", "processes": 2, "step_ms": 12.34, "last": 2.0, "difference": 0.25},
        {"run": "a: killed", "processes": "2, then 4", "ended_s": 1.25, "difference": 0.0},
    ]
    table = _processes._table(rows, 2)
    assert "| a | 2 | 12.3 | 2.0000 | 2.5e-01 |" in table
    assert "| a: killed | 4 | 1.2 | 0.0e+00 |" in table


def test_steps_are_timed_alone_and_beside_a_busy_process(tmp_path, monkeypatch):
    for name, value in (("ROUNDS", 1), ("CALLS", 2), ("MODELS", _busy.MODELS[:1])):
        monkeypatch.setattr(_busy, name, value)
    rows = _busy.measure(tmp_path)
    assert [row["provider"] for row in rows][:2] == ["ours", "layers"]
    assert all(row["alone_ms"] > 0 < row["busy_ms"] for row in rows)
    assert json.loads((tmp_path / "busy.json").read_text()) == rows


def test_memory_is_measured_against_depth(tmp_path, monkeypatch):
    for name, value in (("SHAPE", (3, 8, 8)), ("LEVELS", 2), ("HIDDEN", 8), ("BATCH", 2)):
        monkeypatch.setattr(_memory, name, value)
    rows = _memory.measure(tmp_path, (1, 3), 1, _memory.memory_of)
    assert [(row["K"], row["way"]) for row in rows] == [
        (k, w) for k in (1, 3) for w in _memory.WAYS
    ]
    for name in ("kept_mib", "peak_mib"):
        found = {(row["way"], row["K"]): row[name] for row in rows}
        # of so small a flow checkpointing may take more than what it saves
        assert found["reversible", 3] < found["checkpoint", 3]
        assert found["reversible", 3] < found["stored", 3]
        assert found["reversible", 3] < 1.1 * found["reversible", 1]
    assert all(row["difference"] < 1e-5 and row["ms"] > 0 <= row["resident_mib"] for row in rows)
    assert (tmp_path / "memory.md").read_text().count("\n") == 2 + len(rows)
    assert (tmp_path / "memory.png").stat().st_size > 1000
    vectors = json.loads((tmp_path / "memory_vectors.json").read_text())["rows"]
    for row in vectors:  # one op, or layers that keep nothing: much less than layers that keep all
        assert row["reversible_mib"] < 2 < 40 < row["layers_mib"]
        assert row["stored_mib"] < 2 or "256" in row["flow"]


def test_hours_of_published_budgets(tmp_path, monkeypatch):
    monkeypatch.setattr(_papers, "LEAST_MS", 1.0)
    rows = _papers.measure(tmp_path, ("RealNVP (5)", "NSF (AR)"), 1)
    steps = {"RealNVP (5)": 497_970, "NSF (AR)": 400_000}
    for row in rows:
        assert {"ours", "layers", "eager"} <= {*row["ms"]}
        for provider, ms in row["ms"].items():
            assert row["hours"][provider] == pytest.approx(steps[row["model"]] * ms / 3.6e6)
            assert ms > 0
    assert (tmp_path / "papers.md").read_text().splitlines() == _papers.table(rows)


def test_flows_of_the_papers_are_those_of_the_libraries():
    """The same number of parameters where the other library has the same flow."""
    pytest.importorskip("nflows")
    for name in ("NSF (C)", "NSF (AR)"):
        ours = _papers.settings(name).make()
        (theirs,) = (make() for make in _papers.libraries(name).values())
        count, count_of_theirs = (
            sum(p.numel() for p in flow.parameters()) for flow in (ours, theirs)
        )
        assert count == pytest.approx(count_of_theirs, rel=0.01), name
    assert {*_papers.libraries("MAF (5)")} == {"zuko", "nflows"}
