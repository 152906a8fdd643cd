"""The code in README.md and docs/ runs, and their tables agree with the package and the committed results."""

import json
import re
import shlex
import sys
from pathlib import Path

import fresh
import pytest
import torch
from PIL import Image

from pyflowkern import ops

sys.path.append(str(Path(__file__).parents[1]))  # bench is not part of the installed package
sys.path.append(str(Path(__file__).parents[1] / "docs"))
import _course
import _pictures

from bench._overview import describe, entries, headlines
from bench._papers import MODELS
from bench._papers import table as papers_table
from bench._summary import summary

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "bench/results/cpu-amd-epyc"
PAGES = {
    str(path.relative_to(ROOT)).removeprefix("docs/"): path.read_text()
    for path in (ROOT / "README.md", *sorted(ROOT.glob("docs/**/*.md")))
}
FUNCTIONS = {n for n in ops.__all__ if f"{n}_reference" in ops.__all__}
every_page = pytest.mark.parametrize("page", PAGES)


def blocks(page):
    return re.findall(r"^```(\w*)\n(.*?)^```", PAGES[page], re.DOTALL | re.MULTILINE)


def lines(prefix):
    shell = "".join(body for page in PAGES for kind, body in blocks(page) if kind == "sh")
    return [shlex.split(s, comments=True) for s in shell.splitlines() if s.startswith(prefix)]


def between(page, command):
    """Return the part of a page between the marks of the command that writes it."""
    found = re.search(
        rf"<!-- {re.escape(command)} -->\n(.*?)\n?<!-- end -->", PAGES[page], re.DOTALL
    )
    assert found is not None, command
    return found[1]


@every_page
def test_python_blocks_run_one_after_the_other(page):
    namespace = {}
    for kind, body in blocks(page):
        if kind == "python":
            exec(compile(body, page, "exec"), namespace)
    shapes = {
        "README.md": {"samples": (1000, 5), "log_det": (8,)},
        "guide.md": {"images": (4, 3, 32, 32), "samples": (3, 5), "states": (3, 3)},
        "continuous.md": {"threes": (4, 1, 8, 8), "states": (3, 3), "new": (8, 6)},
    }
    for name, shape in shapes.get(page, {}).items():
        assert namespace[name].shape == shape
    if page == "quick_start.md":
        assert namespace["nats"] > namespace["nats_of_gaussian"]
    if page == "inference.md":
        # a thousand draws alone have 0.03 deviations; the rest is what a training of seconds leaves
        assert namespace["error_of_mean"].abs().max() < 0.5
        assert namespace["corrected"].abs().max() < 0.1  # 5000 draws: 0.02 and less
        found, design, noise = (namespace[name] for name in ("found", "design", "noise"))
        covariance = design @ design.T + noise**2 * torch.eye(3)
        evidence = torch.distributions.MultivariateNormal(torch.zeros(3), covariance)
        exact = float(evidence.log_prob(namespace["observed"]))
        assert abs(found.log_normalizer - exact) < 5 * found.standard_error


def test_every_shell_line_is_of_a_kind_that_is_tested():
    known = [*lines("make "), *lines("pip "), *lines("pyflowkern ")]
    assert len(known) == len(lines(""))


@pytest.mark.slow
def test_commands_run(tmp_path):
    rows = "".join(f"{i / 9:.3f},{i % 7:.3f}\n" for i in range(200))
    (tmp_path / "moons.csv").write_text(f"x,y\n{rows}")  # that the quick start writes
    for words in lines("pyflowkern "):
        if "--steps" in words:
            words[words.index("--steps") + 1] = "2"
        # what a wheel's script does
        done = fresh.run("from pyflowkern.cli import main; main()", *words[1:], cwd=tmp_path)
        assert done.returncode == 0, f"{words}: {done.stdout}{done.stderr}"
    assert (tmp_path / "digits.png").is_file()


def test_targets_exist():
    rules = (ROOT / "Makefile").read_text()
    for _, target in lines("make "):
        assert re.search(rf"^{target}:", rules, re.MULTILINE)


@every_page
def test_results_on_a_page_are_the_committed_ones(page):
    """A page shows nothing where there is no such result yet."""
    for name in re.findall(r"<!-- (bench/results/\S+\.md) -->", PAGES[page]):
        path = ROOT / name
        wanted = path.read_text().strip() if path.exists() else ""
        assert between(page, name).strip() == wanted, name


@every_page
def test_links_lead_somewhere(page):
    folder = ROOT if page == "README.md" else (ROOT / "docs" / page).parent
    prose = re.sub(
        r"^```.*?^```", "", PAGES[page], flags=re.DOTALL | re.MULTILINE
    )  # C++ has [](x)
    for target in re.findall(r"\]\(([^)#]+)\)", prose):
        assert target.startswith("http") or (folder / target).exists(), target


def test_tests_that_a_page_names_exist():
    named = re.findall(r"`(tests/[\w/]+\.py)(?:::(\w+))?`", "".join(PAGES.values()))
    assert named
    for path, name in named:
        assert not name or f"def {name}(" in (ROOT / path).read_text(), f"{path}::{name}"
        assert (ROOT / path).is_file(), path


def test_files_that_the_architecture_names_exist():
    """By the end of their path: a page may leave out what goes before, and the stem after its first use."""
    names = re.findall(r"`([\w/]+\.(?:py|h|cpp|cuh|cu|md|supp))`", PAGES["architecture.md"])
    assert len(names) > 100
    folders = ("csrc", "pyflowkern", "tests", "docs", "bench", "examples")
    there = [str(path) for folder in folders for path in (ROOT / folder).rglob("*.*")]
    missing = [name for name in names if not any(path.endswith(name) for path in there)]
    assert not missing


def test_readme_is_short():
    assert len(PAGES["README.md"].splitlines()) < 150


def test_table_of_ops():
    pattern = r"^\| (`[a-z_`, ]+`) \|.*\| ([^|]*) \| ([^|]*) \|$"
    rows = re.findall(pattern, PAGES["ops.md"], re.MULTILINE)
    named = {name for row in rows for name in re.findall(r"`(\w+)`", row[0])}
    assert named == FUNCTIONS
    for names, cpu, cuda in rows:
        if cpu == "none":
            continue
        for name in re.findall(r"`(\w+)`", names):
            family = getattr(ops, name).__module__.rpartition(".")[2]
            for said, suffix in ((cpu, "cpu.cpp"), (cuda, "cuda.cu")):
                exists = (ROOT / f"csrc/{family}/{family}_{suffix}").is_file()
                assert said.startswith("yes") == exists, f"{name}: {said}"


def test_tables_of_speed_are_those_of_the_committed_results():
    assert between("performance.md", "python -m bench summary") == summary(RESULTS)
    gpus = sorted((ROOT / "bench/results").glob("cuda-*"))
    on_gpu = between("performance.md", "python -m bench summary --device cuda")
    assert on_gpu == summary(next(iter(gpus), None))
    assert between("README.md", "python -m bench overview") == headlines(RESULTS)


def test_picture_shows_the_committed_results():
    with Image.open(RESULTS / "overview.png") as picture:
        assert picture.info["Description"] == describe(entries(RESULTS))


@pytest.mark.parametrize("name", ["moons_to_gaussians", "single_cells", "digits_bridge"])
def test_tables_of_examples_are_those_of_the_committed_results(name):
    written = between("continuous.md", f"python examples/{name}.py")
    assert written.strip() == (RESULTS / f"{name}.md").read_text().strip()
    assert (RESULTS / f"{name}.png").stat().st_size < 150_000


def test_hours_of_the_papers_are_those_of_the_committed_times():
    kept = json.loads((RESULTS / "papers.json").read_text())
    assert (RESULTS / "papers.md").read_text().splitlines() == papers_table(kept["rows"])
    assert [row["model"] for row in kept["rows"]] == [*MODELS]


def test_each_family_has_a_page_of_mathematics_and_its_picture():
    families = {path.name for path in (ROOT / "csrc").iterdir() if path.is_dir()} - {"core"}
    pages = {path.stem for path in (ROOT / "docs/mathematics").glob("*.md")} - {"index"}
    assert families == pages == set(_pictures.KERNELS)
    for family in families:
        drawn = (ROOT / f"docs/mathematics/{family}.svg").read_text()
        assert drawn == _pictures.draw(family), family
        assert f"({family}.svg)" in PAGES[f"mathematics/{family}.md"]
        assert f"({family}.md)" in PAGES["mathematics/index.md"]


def test_each_page_of_the_course_has_its_picture():
    pages = {path.stem for path in (ROOT / "docs/course").glob("*.md")} - {"index"}
    assert pages == set(_course.PICTURES)
    for page, draw in _course.PICTURES.items():
        assert (ROOT / f"docs/course/{page}.svg").read_text() == draw(), page
        assert f"({page}.svg)" in PAGES[f"course/{page}.md"]
        assert f"({page}.md)" in PAGES["course/index.md"]


def test_all_committed_plots_are_on_their_page():
    shown = re.findall(r"\]\(\.\./bench/results/cpu-amd-epyc/(\w+)\.png\)", PAGES["plots.md"])
    assert sorted(shown) == sorted(path.stem for path in RESULTS.glob("*.png"))
