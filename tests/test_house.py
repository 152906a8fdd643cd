"""The rules of the house that a script can see."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
FAMILIES = sorted(p.name for p in (ROOT / "csrc").iterdir() if p.is_dir() and p.name != "core")
#: From what imports everything to what imports nothing; what stands together may import each other.
ORDER = [
    *[
        ("cli", "_commands", "_run_commands"),
        ("train",),
        ("interop",),
        ("flows", "data", "transport"),
        ("nn",),
        ("ode",),
        ("ops", "testing", "estimation"),
        ("core",),
    ],
    ("_library", "_version"),
]
#: Private to the package as a whole, and used throughout it.
SHARED = ("pyflowkern._library", "pyflowkern._version", "pyflowkern._C")
#: On CUDA torch's own layers run: the products of a network as wide as a GPU wants are not ours to beat.
WITHOUT_CUDA = {"conv_network", "field_loss", "relu_network"}


@pytest.mark.parametrize("family", FAMILIES)
def test_one_stem_everywhere(family):
    for path in (
        f"csrc/{family}/{family}.h",
        f"csrc/{family}/{family}_cpu.cpp",
        f"csrc/{family}/{family}_cuda.cu",
        f"pyflowkern/ops/{family}.py",
        f"tests/ops/test_{family}.py",
        f"tests/cases/{family}.py",
        f"bench/ops/{family}.py",
    ):
        wanted = not (path.endswith(".cu") and family in WITHOUT_CUDA)
        assert (ROOT / path).is_file() == wanted, f"{path}: missing, or no longer without CUDA"


def tracked(*patterns):
    listing = subprocess.run(
        ["git", "ls-files", *patterns], cwd=ROOT, capture_output=True, text=True, check=True
    )
    return [ROOT / line for line in listing.stdout.splitlines() if (ROOT / line).is_file()]


def test_files_are_short():
    long = {
        str(p.relative_to(ROOT)): n
        for p in tracked("*.py", "*.cpp", "*.cu", "*.h", "*.cuh")
        if (n := len(p.read_text().splitlines())) > 400
    }
    assert not long


def test_no_file_holds_both_sides_of_a_merge():
    marks = re.compile(r"^(<{7}|>{7})( |$)", re.MULTILINE)  # a line of = is a heading elsewhere
    files = tracked("*.md", "*.py", "*.cpp", "*.cu", "*.h", "*.cuh", "*.yml", "*.yaml", "*.toml")
    assert not [path for path in files if marks.search(path.read_text())]


def test_functions_fit_a_screen():
    """60 lines below the docstring."""
    long = {
        f"{path.relative_to(ROOT)}: {node.name}": lines
        for path in tracked("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
        and (lines := node.end_lineno - _start(node)) > 60
    }
    assert not long


def _start(function):
    return function.body[0].end_lineno if ast.get_docstring(function) else function.lineno - 1


#: What is no code: comments, lines of the preprocessor, texts, characters.
NO_CODE = re.compile(
    r"//[^\n]*|/\*.*?\*/|^[ \t]*#(?:\\\n|[^\n])*|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\])'",
    re.M | re.S,
)
TEMPLATE = re.compile(r"template\s*<.*?>\s+(?=[A-Za-z_])", re.S)
NO_FUNCTION = ("namespace", "struct", "class", "union", "enum", "extern")


def cpp_functions(text):
    """Yield the head of each function of a C++ file, and its lines from there to the last brace."""
    code = NO_CODE.sub(lambda match: "\n" * match[0].count("\n"), text)
    code = re.sub(r"\bPFK_(BEGIN|END)\b", ";", code)  # they open and close namespaces
    begin, depth, head = 0, 0, None  # begin: of a statement that is in no function
    for mark in re.finditer("[;{}]", code):
        if mark[0] == "{":
            start = TEMPLATE.sub("", code[begin : mark.start()].lstrip())
            if head is None and ")" in start and not start.startswith(NO_FUNCTION):
                head, outer = start.split("(")[0], depth
                begin = mark.start() - len(code[begin : mark.start()].lstrip())
            depth += 1
        elif mark[0] == "}":
            depth -= 1
            if head is not None and depth == outer:
                yield head, code.count("\n", begin, mark.start()) + 1
                head = None
        if head is None:
            begin = mark.end()


def test_functions_of_cpp_fit_a_screen():
    """60 lines with the head."""
    long = {
        f"{path.relative_to(ROOT)}: {head}": lines
        for path in tracked("*.cpp", "*.cu", "*.h", "*.cuh")
        for head, lines in cpp_functions(path.read_text())
        if lines > 60
    }
    assert not long


def test_functions_of_cpp_are_found():
    """Also in types, behind attributes and template parameters, and with braces that do not count."""
    text = """PFK_BEGIN
template <class T, class U = Vec<T>>
struct alignas(sizeof(T)) Pair {
  Pair() : text("}") {
    // }
  }
  int size = 2;
};
int table[] = {1, 2};
template <bool kOn>
__global__ void __launch_bounds__(2)
    kernel(int a) {
#define OPEN {
  if (a) { a = '{'; }
}
"""
    heads = [(head.split()[-1], lines) for head, lines in cpp_functions(text)]
    assert heads == [("Pair", 3), ("__launch_bounds__", 6)]


def imported(path):
    """Return the modules that a file imports, wherever in it, by their full names."""
    package = path.relative_to(ROOT).with_suffix("").parts[:-1]
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = [node.module] if node.module else []
            if node.level:
                module = [*package[: len(package) - node.level + 1], *module]
            # what is named may be a module itself
            yield from (".".join([*module, alias.name]) for alias in node.names)


def layer_of(module):
    """Return the layer of a module of the package, none where it belongs to none."""
    parts = module.split(".")
    if parts[0] != "pyflowkern" or len(parts) < 2:
        return None
    return next((i for i, names in enumerate(ORDER) if parts[1] in names), None)


def test_imports_run_one_way():
    """cli -> train -> data, flows, transport -> nn -> ode -> ops -> core -> _library, never back."""
    seen = set()
    for path in tracked("pyflowkern/*.py", "pyflowkern/**/*.py"):
        own = layer_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        if own is None:
            continue
        for module in imported(path):
            other = layer_of(module)
            assert other is None or other >= own, f"{path.relative_to(ROOT)} imports {module}"
            seen |= {other}
    assert seen >= set(range(len(ORDER)))  # every layer is looked at


def test_private_names_stay_in_their_package():
    """What another package needs is named without an underscore; what all of them need is in core."""
    for path in tracked("pyflowkern/*.py", "pyflowkern/**/*.py", "bench/*.py", "examples/*.py"):
        package = ".".join(path.relative_to(ROOT).parts[:-1])
        for module in imported(path):
            parts = module.split(".")
            if parts[0] not in ("pyflowkern", "bench") or module.startswith(SHARED):
                continue
            private = next((i for i, part in enumerate(parts) if part.startswith("_")), None)
            home = ".".join(parts[:private])
            assert private is None or package == home or package.startswith(f"{home}."), (
                f"{path.relative_to(ROOT)} imports {module}, private to {home}"
            )


@pytest.mark.parametrize(
    ("line", "module"),
    [
        ("from pyflowkern import flows", "pyflowkern.flows"),
        ("import pyflowkern.nn", "pyflowkern.nn"),
        ("from .. import ode", "pyflowkern.ode"),
        ("from ..train.trainer import fit", "pyflowkern.train.trainer.fit"),
        (
            "def f():\n    from pyflowkern.nn.linear import InvertibleLinear",
            "pyflowkern.nn.linear",
        ),
    ],
)
def test_no_way_to_import_goes_unseen(line, module, monkeypatch, tmp_path):
    monkeypatch.setattr(sys.modules[__name__], "ROOT", tmp_path)
    path = tmp_path / "pyflowkern" / "ops" / "some.py"
    path.parent.mkdir(parents=True)
    path.write_text(line)
    assert any(name.startswith(module) for name in imported(path))


def test_the_core_needs_torch_alone():
    code = (
        "import sys; before = set(sys.modules); import torch; torch_needs = set(sys.modules)\n"
        "import pyflowkern; new = set(sys.modules) - torch_needs\n"
        "bad = {m.split('.')[0] for m in new} & {'lightning', 'typer', 'yaml', 'PIL', 'sklearn',"
        " 'skimage', 'matplotlib'}\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
