"""Write the C++ source of the library that defines the ops where the Python package does not.

Called by CMake as ``python csrc/schemas.py FILE``.  Schemas stand in Python, in pyflowkern/ops, and nowhere else.
"""

import sys
from pathlib import Path

import torch

from pyflowkern._library import OPS

HEAD = """\
// Written by csrc/schemas.py.
#include <torch/csrc/stable/library.h>

#include <exception>

static const char* const kSchemas[] = {"""

#: An exception that leaves here would end the process.
TAIL = """\
};

STABLE_TORCH_LIBRARY_FRAGMENT(pyflowkern, m) {
  for (const char* schema : kSchemas) {
    try {
      m.def(schema);
    } catch (const std::exception&) {
      return;  // the Python package, or a copy of this library, has defined all of them
    }
  }
}
"""


def source() -> str:
    """Return C++ that defines all ops."""
    schemas = [str(getattr(torch.ops.pyflowkern, op).default._schema) for op in OPS]
    lines = [f'    R"({schema.removeprefix("pyflowkern::")})",' for schema in schemas]
    return "\n".join([HEAD, *lines, TAIL])


if __name__ == "__main__":
    Path(sys.argv[1]).write_text(source())
