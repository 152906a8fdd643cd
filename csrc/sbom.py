"""Write the bill of materials of a wheel: CycloneDX 1.6 as JSON, which PEP 770 puts into ``.dist-info/sboms``.

Called by CMake as ``python csrc/sbom.py FILE --version ... --torch ... --pybind11 ... --compiler ... [--cuda ...]``.
It names what a scanner could not see from the outside: the code of others that is compiled into the libraries.
Packages that are installed beside the wheel stand in its METADATA.  The same arguments give the same bytes.
"""

import argparse
import json
from pathlib import Path
from typing import Any

Json = dict[str, Any]


def library(kind: str, name: str, version: str, licence: Json, text: str, **more: Any) -> Json:
    """Return a component that is a library; ``kind`` is the type of its package URL."""
    return {
        "type": "library",
        "bom-ref": f"{name}@{version}",
        "name": name,
        "version": version,
        "purl": f"pkg:{kind}/{name}@{version}",
        "licenses": [{"license": licence}],
        "description": text,
        **more,
    }


def bill(version: str, torch: str, pybind11: str, compiler: str, cuda: str) -> Json:
    """Return the document; an empty ``cuda`` is a build without CUDA kernels."""
    ours = library(
        "pypi",
        "pyflowkern",
        version,
        {"id": "Apache-2.0"},
        "Fused C++/CUDA kernels, layers and flows for normalizing flows in PyTorch",
    )
    parts = [
        library(
            "pypi",
            "torch",
            torch.partition("+")[0],
            {"id": "BSD-3-Clause"},
            "Its headers are compiled into libpyflowkern_*.so. Its libraries are not part of the wheel.",
        ),
        library(
            "pypi",
            "pybind11",
            pybind11,
            {"id": "BSD-3-Clause"},
            "A library of headers, compiled into _C.",
        ),
    ]
    if cuda:
        parts.append(
            library(
                "generic",
                "cudart",
                cuda,
                {"name": "NVIDIA CUDA Toolkit End User License Agreement"},
                "CUDA's runtime, linked statically into libpyflowkern_cuda.so.",
                supplier={"name": "NVIDIA Corporation"},
            )
        )
    name, _, number = compiler.partition(" ")
    tool = {"type": "application", "name": name, "version": number}
    return {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {"component": ours, "tools": {"components": [tool]}},
        "components": parts,
        "dependencies": [
            {"ref": ours["bom-ref"], "dependsOn": [part["bom-ref"] for part in parts]},
            *({"ref": part["bom-ref"]} for part in parts),
        ],
    }


def main() -> None:
    """Write the file that the arguments name."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("file", type=Path)
    for name in ("version", "torch", "pybind11", "compiler"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--cuda", default="")
    given = parser.parse_args()
    document = bill(given.version, given.torch, given.pybind11, given.compiler, given.cuda)
    given.file.write_text(json.dumps(document, indent=1) + "\n")


if __name__ == "__main__":
    main()
