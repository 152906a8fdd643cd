"""Compiler output for the CUDA kernels: resources from ptxas, memory accesses from SASS or PTX."""

from __future__ import annotations

import math
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from pyflowkern import _library

__all__ = ["Kernel", "kernels", "table"]

ROOT = Path(__file__).parent.parent
#: Registers, warps, shared memory in bytes and blocks of a multiprocessor (CUDA C++ Programming Guide, table 30).
LIMITS = {
    "sm_80": (65536, 64, 164 << 10, 32),
    "sm_86": (65536, 48, 100 << 10, 16),
    "sm_87": (65536, 48, 164 << 10, 16),
    "sm_89": (65536, 48, 100 << 10, 24),
    "sm_90": (65536, 64, 228 << 10, 32),
    "sm_100": (65536, 64, 228 << 10, 32),
    "sm_103": (65536, 64, 228 << 10, 32),
    "sm_120": (65536, 48, 100 << 10, 24),
}
COMPILED = re.compile(r"Compiling entry function '(\S+)' for '(sm_\d+)'")
USED = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
REGISTERS = re.compile(r"Used (\d+) registers")
SHARED = re.compile(r"(\d+) bytes smem")
PTX_ACCESS = re.compile(
    r"\b(ld|st)\.(?:volatile\.|relaxed\.\w+\.|weak\.)?global(?:\.nc)?(?:\.L\w+)*(?:\.v([248]))?\.[busf](\d+)\b"
)
SASS_ACCESS = re.compile(r"\b(LD|ST)G\.E(?:\.\w+)*?(?:\.(U8|S8|U16|S16|64|128))?(?:\.\w+)*\s")
SASS_BYTES = {"U8": 1, "S8": 1, "U16": 2, "S16": 2, "64": 8, "128": 16, None: 4}


@dataclass
class Kernel:
    """One kernel for one architecture."""

    source: str
    name: str
    arch: str
    registers: int
    stack: int
    spills: int
    shared: int
    threads: int = 0
    #: Accesses of each innermost loop: ("ld" or "st", bytes) -> instructions.
    loops: list[Counter[tuple[str, int]]] = field(default_factory=list)

    @property
    def accesses(self) -> Counter[tuple[str, int]]:
        """Accesses of all its innermost loops."""
        return sum(self.loops, Counter())

    @property
    def taken_apart(self) -> bool:
        """Whether a loop that loads 16 bytes at once stores fewer: the compiler has split a pack."""
        return any(
            loop["ld", 16] and any(kind == "st" and width < 16 for kind, width in loop)
            for loop in self.loops
        )

    @property
    def occupancy(self) -> float:
        """Theoretical occupancy: the share of a multiprocessor's warps that registers and static shared memory allow.

        NaN for an architecture whose limits this file does not know.
        """
        if self.arch not in LIMITS:
            return math.nan
        registers, warps, shared, blocks = LIMITS[self.arch]
        mine = max(1, self.threads // 32)
        of_registers = registers // (-(-self.registers * 32 // 256) * 256 * mine)
        of_shared = shared // (-(-(self.shared + 1024) // 128) * 128)
        return min(blocks, of_registers, of_shared, warps // mine) * mine / warps


def reports() -> list[Path]:
    """Return the files with ptxas' reports of the newest build, one for each source."""
    found: dict[str, Path] = {}
    for path in sorted(ROOT.glob("build/*/ptxas/*.txt"), key=lambda p: p.stat().st_mtime):
        found[path.stem] = path
    return [found[stem] for stem in sorted(found)]


def _resources(path: Path) -> Iterator[Kernel]:
    parts = COMPILED.split(path.read_text())
    for name, arch, text in zip(parts[1::3], parts[2::3], parts[3::3], strict=True):
        used, registers, shared = USED.search(text), REGISTERS.search(text), SHARED.search(text)
        if used is None or registers is None:
            raise ValueError(f"{path} does not report the resources of {name} for {arch}")
        stack, stores, loads = map(int, used.groups())
        number = int(shared[1]) if shared else 0
        yield Kernel(path.stem, name, arch, int(registers[1]), stack, stores + loads, number)


def _ptx(report: Path) -> str:
    """Return the PTX of a source: that of the build, if it has left it.

    A build that a compiler's cache answers leaves none. Then the source is compiled here, again after each change.
    """
    if (built := report.with_suffix(".ptx")).is_file():
        return built.read_text()
    stem = report.stem
    source = next(ROOT.glob(f"csrc/*/{stem}.cu"))
    path = ROOT / "build" / "ptx" / f"{stem}.ptx"
    newest = max(p.stat().st_mtime for p in ROOT.glob("csrc/**/*") if p.is_file())
    if not path.is_file() or path.stat().st_mtime < newest:
        path.parent.mkdir(parents=True, exist_ok=True)
        include = Path(torch.__path__[0]) / "include"
        flags = "-std=c++20 -O3 -arch=compute_80 -ptx --expt-relaxed-constexpr -DUSE_CUDA"
        defines = "-DPFK_SIMD_NAMESPACE=cuda -DTORCH_TARGET_VERSION=0x020b000000000000"
        places = ["-I", str(ROOT / "csrc"), "-isystem", str(include)]
        nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
        command = [nvcc, *flags.split(), *defines.split(), *places, str(source), "-o"]
        # tests run in several processes; none must see a file that another has not finished
        with tempfile.TemporaryDirectory(dir=path.parent) as own:
            made = Path(own) / path.name
            subprocess.run([*command, str(made)], check=True, capture_output=True)
            made.replace(path)
    return path.read_text()


Access = tuple[str, int]


def _loops(
    lines: list[str],
    label: re.Pattern[str],
    branch: re.Pattern[str],
    access: Callable[[str], Access | None],
) -> list[Counter[Access]]:
    """Return the accesses of each innermost loop, the lines between a label and a branch back to it."""
    labels: dict[str, int] = {}
    loops: list[tuple[int, int]] = []
    for i, line in enumerate(lines):
        if found := label.match(line):
            labels[found[1].lstrip("0") or "0"] = i
        if (found := branch.search(line)) and (target := found[1].lstrip("0") or "0") in labels:
            loops.append((labels[target], i))
    inner = {
        (a, b)
        for a, b in loops
        if not any(a <= c and d <= b and (a, b) != (c, d) for c, d in loops)
    }
    return [
        Counter(found for line in lines[a : b + 1] if (found := access(line))) for a, b in inner
    ]


def _access_in_ptx(line: str) -> Access | None:
    found = PTX_ACCESS.search(line)
    return (found[1], int(found[2] or 1) * int(found[3]) // 8) if found else None


def _access_in_sass(line: str) -> Access | None:
    found = SASS_ACCESS.search(line)
    return (found[1].lower(), SASS_BYTES[found[2]]) if found else None


def _accesses_in_ptx(text: str) -> Iterator[tuple[str, int, list[Counter[Access]]]]:
    label, branch = re.compile(r"(\$L\w+):"), re.compile(r"\bbra(?:\.uni)?\s+(\$L\w+);")
    for found in re.finditer(r"\.entry (\S+?)\((.*?)\n\}\n", text, re.DOTALL):
        threads = re.search(r"\.maxntid (\d+)", found[0])
        loops = _loops(found[0].splitlines(), label, branch, _access_in_ptx)
        yield found[1], int(threads[1]) if threads else 0, loops


def _sass() -> str:
    """Return the machine code of the CUDA library; "" without cuobjdump or a library."""
    library = next((p for p in _library._candidates("libpyflowkern_cuda.so") if p.is_file()), None)
    tool = shutil.which("cuobjdump")
    if tool is None or library is None:
        return ""
    return subprocess.run([tool, "-sass", str(library)], capture_output=True, text=True).stdout


def _accesses_in_sass(text: str) -> dict[tuple[str, str], list[Counter[Access]]]:
    """Return the accesses of each (kernel, arch); the labels of branches are addresses here."""
    label, branch = (
        re.compile(r"\s*/\*([0-9a-f]{4,})\*/\s+\S"),
        re.compile(r"\bBRA\b[^;/]*?\b0x([0-9a-f]+) ;"),
    )
    result: dict[tuple[str, str], list[Counter[Access]]] = {}
    arch = ""
    for part in re.split(r"(?=\tFunction : |^arch = )", text, flags=re.MULTILINE):
        if found := re.match(r"arch = (sm_\d+)", part):
            arch = found[1]
        elif found := re.match(r"\tFunction : (\S+)", part):
            lines = [line.split(" ;", 1)[0] + " ;" for line in part.splitlines() if " ;" in line]
            result[found[1], arch] = _loops(lines, label, branch, _access_in_sass)
    return result


def kernels() -> list[Kernel]:
    """Return every kernel of the newest build for every architecture, with readable names."""
    sass = _accesses_in_sass(_sass())
    found: list[Kernel] = []
    for path in reports():
        of_file = list(_resources(path))
        mangled = [(k.name, k.arch) for k in of_file]
        ptx = list(_accesses_in_ptx(_ptx(path)))
        by_name = dict(zip(_readable([name for name, *_ in ptx]), ptx, strict=True))
        for kernel, name in zip(of_file, _readable([k.name for k in of_file]), strict=True):
            kernel.name = name  # a mangled one holds a hash that differs between compilations
            _, kernel.threads, kernel.loops = by_name[name]
        for kernel, key in zip(of_file, mangled, strict=True):
            kernel.loops = sass.get(key, kernel.loops)
        found += of_file
    return found


def _readable(names: list[str]) -> list[str]:
    """Return demangled names such as ``family_kernel<float, true>`` where c++filt is installed."""
    tool = shutil.which("c++filt")
    if tool is None or not names:
        return [re.sub(r"_GLOBAL__N__\w*?_cu_[0-9a-f]+_\d+", "", name) for name in names]
    text = subprocess.run([tool], input="\n".join(names), capture_output=True, text=True).stdout
    plain = re.compile(r"pfk::(?:cuda::)?|\(anonymous namespace\)::|^void |__(?:nv_)?")
    return [plain.sub("", line).rsplit("(", 1)[0] for line in text.splitlines()]


def table(found: list[Kernel]) -> str:
    """Return the kernels as a markdown table."""
    lines = [
        "| kernel | arch | registers | stack | spills | shared | occupancy | loads in loops | stores |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for k in found:
        widths = [
            ", ".join(
                f"{n} of {w} B" for (kind, w), n in sorted(k.accesses.items()) if kind == wanted
            )
            for wanted in ("ld", "st")
        ]
        cells = [k.name, k.arch, k.registers, k.stack, k.spills, k.shared, f"{k.occupancy:.0%}"]
        lines.append(f"| {' | '.join(map(str, [*cells, *widths]))} |")
    return "\n".join(lines)
