// SPDX-License-Identifier: Apache-2.0
// The pybind11 module `_C`: facts of this build.  It sees no torch header, so it imports under any
// torch.
#include <pybind11/pybind11.h>

#include <map>
#include <string>

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of pyflowkern.";
  m.def(
      "build_info",
      [] {
        pybind11::dict facts;
        facts["version"] = PFK_VERSION;
        facts["built against torch"] = PFK_TORCH;
        facts["oldest torch"] = "2.11";
        facts["compiler"] = PFK_COMPILER;
        facts["SIMD levels"] = PFK_SIMD;
        facts["CUDA"] = PFK_CUDA;
        return facts;
      },
      "Return version, compiler, SIMD levels and CUDA architectures of this build.");
}
