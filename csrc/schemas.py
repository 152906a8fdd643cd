"""Write the C++ source of the library that defines the ops where the Python package does not.

Called by CMake as ``python csrc/schemas.py FILE``.  Schemas stand in Python, in pyflowkern/ops, and nowhere else.
"""

import sys
from pathlib import Path

import torch

from pyflowkern._library import OPS


def source() -> str:
    """Return C++ that defines all ops."""
    schemas = [str(getattr(torch.ops.pyflowkern, op).default._schema) for op in OPS]
    lines = [f'  m.def(R"({schema.removeprefix("pyflowkern::")})");' for schema in schemas]
    head = "// Written by csrc/schemas.py.\n#include <torch/csrc/stable/library.h>\n"
    return "\n".join([head, "STABLE_TORCH_LIBRARY_FRAGMENT(pyflowkern, m) {", *lines, "}", ""])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source())
