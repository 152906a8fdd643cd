"""Every flow works with every subsystem of PyTorch, or says why not: the cells of the table in docs/subsystems.md."""

import re
from functools import partial
from pathlib import Path

import fresh
import pytest
import torch
from cases.flows import IAF, MAF, NSF, Glow, K, RealNVP
from laws import ADAPTIVE, ModuleCase, subsystems
from laws import module_checks as laws

import pyflowkern
from pyflowkern import flows

# few steps, as compilers and exporters trace each evaluation of a field
FIXED = {"divergence": "exact", "context_features": K, "method": "midpoint", "step_size": 0.5}
case, ode = partial(ModuleCase, atol=1e-8), partial(ModuleCase, atol=1e-2, ode=True)
ROWS = {
    "RealNVP": case("RealNVP", lambda: RealNVP(3), (3,)),
    "Glow": case("Glow", lambda: Glow(3), (3,)),
    "Glow, images": case("Glow, images", lambda: Glow((2, 2, 4), levels=1), (2, 2, 4)),
    "MAF": case("MAF", lambda: MAF(3), (3,)),
    "IAF": case("IAF", lambda: IAF(3), (3,)),
    "NSF": case("NSF", lambda: NSF(3), (3,)),
    "NSF, autoregressive": case("NSF, autoregressive", lambda: NSF(3, autoregressive=True), (3,)),
    "CNF": ode("CNF", lambda: flows.CNF(3, (4, 4), **FIXED), (3,)),
    "FFJORD": ode("FFJORD", lambda: flows.FFJORD(3, (4,), **FIXED), (3,)),
    "FlowMatching": ode("FlowMatching", lambda: flows.FlowMatching(3, (4,), **FIXED), (3,)),
    "CNF, adaptive steps": ModuleCase(
        "CNF, adaptive steps",
        lambda: flows.CNF(3, (4, 4), divergence="exact", context_features=K),
        (3,),
        atol=1e-3,
        **ADAPTIVE,
    ),
}
#: Subsystems, and their checks of a flow.  Those of module_checks are laws of test_laws.py for all flows but the last.
COLUMNS = {
    "compile": (
        subsystems.check_compiled_density,
        subsystems.check_compiled_samples,
        subsystems.check_compiled_training,
    ),
    "autocast": (laws.check_autocast,),
    "vmap, grad": (laws.check_function_transforms,),
    "jvp, jacrev, hessian": (subsystems.check_derivatives,),
    "ensembles": (subsystems.check_ensembles,),
    "gradgradcheck": (subsystems.check_second_derivatives,),
    "export": (),  # below, all in one process
    "ONNX": (subsystems.check_without_ops,),
    "no waits": (subsystems.check_no_waits,),
    "parametrizations": (subsystems.check_parametrizations,),
    "averages": (subsystems.check_averages,),
    "workers": (),  # below, likewise
    "threads": (subsystems.check_threads,),
    "deterministic": (subsystems.check_deterministic,),
    "defaults": (subsystems.check_defaults,),
    "saved": (laws.check_copies_and_meta, subsystems.check_saved),
}
#: What a flow of adaptive steps refuses, whose number depends on the data: the error, and what it says.
UNSUPPORTED = torch._dynamo.exc.Unsupported
IN_TRANSFORMS = (RuntimeError, r"inside transforms of torch.func with fixed steps")
REFUSED = {
    "compile": (UNSUPPORTED, r"the ODE of a continuous flow .* without fullgraph"),
    "vmap, grad": IN_TRANSFORMS,
    "jvp, jacrev, hessian": IN_TRANSFORMS,
    "ensembles": IN_TRANSFORMS,
    "export": (RuntimeError, r"export cannot hold the ODE .* method='rk4', step_size=0.1"),
    "ONNX": (RuntimeError, r"export cannot hold the ODE .* method='rk4', step_size=0.1"),
    "no waits": (RuntimeError, "meta tensors"),
}
KNOWN = [name for name in ROWS if name != "CNF, adaptive steps"]
CELLS = [
    pytest.param(row, check, id=f"{row}-{check.__name__.removeprefix('check_')}")
    for row in KNOWN
    for checks in COLUMNS.values()
    for check in checks
    if check.__module__ != laws.__name__
]
OF_ADAPTIVE_STEPS = [
    pytest.param(column, check, id=check.__name__.removeprefix("check_"))
    for column, checks in COLUMNS.items()
    for check in checks
    if check is not laws.check_copies_and_meta  # steps wait for numbers
]


@pytest.mark.parametrize(("row", "check"), CELLS)
@pytest.mark.filterwarnings("ignore:a layer of a masked network has hooks")
def test_a_flow_works_with(row, check):
    check(ROWS[row])


@pytest.mark.parametrize(("column", "check"), OF_ADAPTIVE_STEPS)
def test_adaptive_steps_work_with(column, check):
    adaptive = ROWS["CNF, adaptive steps"]
    if column not in REFUSED or column == "vmap, grad":  # a law that knows of the error itself
        check(adaptive)
        return
    error, text = REFUSED[column]
    with pytest.raises(error, match=text):
        check(adaptive)


def test_adaptive_steps_are_not_exported():
    error, text = REFUSED["export"]
    with pytest.raises(error, match=text):
        subsystems.exported(ROWS["CNF, adaptive steps"], "log_prob")


# --- all rows in one process ---

LIBRARIES = Path(pyflowkern._library._loaded["cpu"]).parent


def run_without_the_package(folder, arguments):
    """Run the programs of a folder, by the names of their files, in a process without the package."""
    torch.save(arguments, folder / "arguments.pt")
    done = fresh.run(
        subsystems.WITHOUT_THE_PACKAGE, folder, LIBRARIES, cwd=folder, PYTHONPATH=str(folder)
    )
    assert done.returncode == 0, done.stderr
    return torch.load(folder / "found.pt")


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder, arguments, expected = tmp_path_factory.mktemp("programs"), {}, {}
    for row in KNOWN:
        for method in ("log_prob", "sample"):
            name = f"{row} {method}"
            program, arguments[name], expected[name] = subsystems.exported(ROWS[row], method)
            torch.export.save(program, folder / f"{name}.pt2")
    return run_without_the_package(folder, arguments), expected


@pytest.mark.parametrize("method", ["log_prob", "sample"])
@pytest.mark.parametrize("row", KNOWN)
def test_an_exported_program_runs_without_the_package(row, method, programs):
    found, expected = (results[f"{row} {method}"] for results in programs)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-4)


class Two(torch.nn.Module):
    """Densities of two flows, and samples of one: one package takes half of the compiler's time."""

    def __init__(self, *two):
        super().__init__()
        self.two = torch.nn.ModuleList(two)

    def forward(self, x, context):
        densities = [flow.log_prob(x, context) for flow in self.two]
        return *densities, self.two[1].sample(x.shape[0], context)


@pytest.mark.slow
def test_a_package_of_aotinductor_runs_without_this_one(tmp_path):
    (maf, x, context), nsf = ROWS["MAF"].make(1000, torch.float32), ROWS["NSF"].make()[0].float()
    two = Two(maf, nsf).requires_grad_(False)
    program = torch.export.export(two, (x, context), strict=False)
    torch._inductor.aoti_compile_and_package(
        program,
        package_path=str(tmp_path / "compiled.pt2"),
        inductor_configs={"aot_inductor.precompile_headers": False},  # no other package uses them
    )
    *found, sample = run_without_the_package(tmp_path, {"compiled": (x, context)})["compiled"]
    torch.testing.assert_close(found, [*two(x, context)[:2]], rtol=1e-4, atol=1e-4)
    z, _ = nsf(sample, context)  # of random numbers of Inductor's; 0.2 is six standard errors
    torch.testing.assert_close(z.mean(0), torch.zeros(3), rtol=0, atol=0.2)
    torch.testing.assert_close(z.std(0), torch.ones(3), rtol=0, atol=0.2)


@pytest.fixture(scope="module")
def workers():
    return subsystems.in_workers(ROWS.values())


@pytest.mark.parametrize("row", ROWS)
def test_forked_workers_compute_the_same(row, workers):
    found, expected = workers[row]
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


# --- the table ---


def table():
    """Return the table of docs/subsystems.md."""
    lines = [
        "| | " + " | ".join(KNOWN) + " | CNF, adaptive steps |",
        "|---|" + "---|" * len(ROWS),
    ]
    for column in COLUMNS:
        last = "error" if column in REFUSED else "yes"
        lines.append(f"| {column} | " + "yes | " * len(KNOWN) + f"{last} |")
    return "\n".join(lines)


def test_the_table_is_that_of_the_tests():
    page = Path(__file__).parents[2].joinpath("docs/subsystems.md").read_text()
    found = re.search(r"<!-- tests/flows/test_subsystems.py -->\n(.*?)\n<!-- end -->", page, re.S)
    assert found is not None
    assert found[1] == table(), table()
    for column in COLUMNS:
        assert f"**{column}**" in page
