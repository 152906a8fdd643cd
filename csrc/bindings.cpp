// SPDX-License-Identifier: Apache-2.0
// The pybind11 module `_C`: facts of this build, and the integers that cross from Python to C++. It
// sees no torch header, so it imports under any torch.
#include <pybind11/pybind11.h>

#include <initializer_list>
#include <utility>

#include "core/codes.h"

namespace {

using Names = std::initializer_list<std::pair<const char*, int>>;

pybind11::dict dict_of(Names names) {
  pybind11::dict values;
  for (const auto& [name, value] : names) values[name] = value;
  return values;
}

int of(pfk::Activation a) { return static_cast<int>(a); }

// Each of these adds enumerations of core/codes.h, under the names that they have in
// pyflowkern/core/codes.py.
void add_affine_codes(pybind11::dict& c) {
  using namespace pfk;
  c["ScaleKind"] = dict_of({{"EXP", kExp},
                            {"TANH", kTanh},
                            {"ATAN", kAtan},
                            {"SIGMOID", kSigmoid},
                            {"SOFTPLUS", kSoftplus},
                            {"SOFTCLIP", kSoftclipScale},
                            {"ADDITIVE", kAdditive},
                            {"SOFTPLUS_ASINH", kSoftplusAsinh},
                            {"SOFTPLUS_TANH", kSoftplusTanh}});
  c["ParamsLayout"] = dict_of({{"BLOCKED", kBlocked},
                               {"INTERLEAVED", kInterleaved},
                               {"FEATURE_MAJOR", kFeatureMajor},
                               {"BLOCKED_RAW_FIRST", kRawFirst + kBlocked},
                               {"INTERLEAVED_RAW_FIRST", kRawFirst + kInterleaved},
                               {"FEATURE_MAJOR_RAW_FIRST", kRawFirst + kFeatureMajor}});
  c["AffineFlag"] = dict_of({{"INVERSE", kInverse},
                             {"SWAP", kSwap},
                             {"SHIFT_FIRST", kShiftFirst},
                             {"DIVIDE", kDivide},
                             {"FROM_OUTPUT", kFromOutput}});
}

void add_spline_codes(pybind11::dict& c) {
  using namespace pfk;
  c["SplineKind"] = dict_of({{"RATIONAL_QUADRATIC", kRational},
                             {"LINEAR", kLinearSpline},
                             {"QUADRATIC", kQuadratic},
                             {"CUBIC", kCubic}});
  c["SplineTails"] = dict_of({{"LINEAR", kIdentityTails},
                              {"CIRCULAR", kCircular},
                              {"NONE", kNoTails},
                              {"AFFINE", kAffineTails}});
  c["SplineParameterization"] =
      dict_of({{"SOFTMAX", kSoftmax}, {"SOFTCLIP", kSoftclip}, {"DOMAIN", kDomain}});
  c["SplineFlag"] = dict_of({{"INVERSE", kSplineInverse},
                             {"ELEMENTWISE", kSplineElementwise},
                             {"SWAP", kSplineSwap},
                             {"COUPLING", kSplineCoupling}});
}

void add_density_and_field_codes(pybind11::dict& c) {
  using namespace pfk;
  c["WantedGradient"] = dict_of({{"Z", kGradZ}, {"MEAN", kGradMean}, {"LOG_STD", kGradLogStd}});
  c["FieldActivation"] = dict_of(
      {{"TANH", kActTanh}, {"SOFTPLUS", kActSoftplus}, {"SILU", kActSilu}, {"GELU", kActGelu}});
  c["FieldFlag"] = dict_of({{"KEEP", kFieldKeep},
                            {"IN_CACHE", kFieldInCache},
                            {"NORM", kFieldNorm},
                            {"FLAT", kFieldFlat}});
}

void add_network_codes(pybind11::dict& c) {
  using namespace pfk;
  using A = Activation;
  c["MaskedActivation"] = dict_of({{"IDENTITY", of(A::kIdentity)},
                                   {"RELU", of(A::kRelu)},
                                   {"LEAKY_RELU", of(A::kLeakyRelu)},
                                   {"ELU", of(A::kElu)},
                                   {"TANH", of(A::kTanh)},
                                   {"SIGMOID", of(A::kSigmoid)},
                                   {"SILU", of(A::kSilu)},
                                   {"GELU", of(A::kGelu)},
                                   {"SOFTPLUS", of(A::kSoftplus)}});
  c["StructureHead"] = dict_of(
      {{"FEATURES", kFeatures}, {"OUTPUTS", kOutputs}, {"LEVELS", kLevels}, {"WIDEST", kWidest}});
  c["StructureLayer"] = dict_of({{"SOURCE", kSource},
                                 {"READS_ACTIVATED", kReadsActivated},
                                 {"RESIDUAL", kResidual},
                                 {"SEEN_THROUGH", kSeenThrough},
                                 {"FLAGS", kLayerFlags}});
  c["LayerFlag"] = dict_of({{"KEEPS_RAW", kKeepsRaw}, {"GATED", kGated}});
  c["ElementFamily"] = dict_of({{"AFFINE", kAffineElements}, {"SPLINE", kSplineElements}});
}

void add_chain_codes(pybind11::dict& c) {
  using namespace pfk;
  c["ChainStep"] = dict_of({{"PERMUTE", kPermuteStep},
                            {"ACTNORM", kActNormStep},
                            {"LINEAR", kLinearStep},
                            {"PLU", kPluStep},
                            {"SHIFT", kShiftStep},
                            {"ELEMENTS", kElementsStep},
                            {"LU", kLuStep}});
  c["ChainBase"] = dict_of({{"NONE", kNoBase}, {"NORMAL", kNormalBase}});
  c["ChainLayerFlag"] = dict_of({{"MASKED", kLayerMasked},
                                 {"COLUMNS", kLayerColumns},
                                 {"ROWS", kLayerRows},
                                 {"CONTEXT", kLayerContext},
                                 {"GATE", kLayerGate},
                                 {"CONTEXT_BIAS", kLayerContextBias}});
  c["ChainElementsFlag"] = dict_of({{"CENTRED", kCentredElements}, {"TURNED", kTurnedElements}});
  c["ChainNetworkFlag"] = dict_of({{"RESIDUAL", kResidualNetwork},
                                   {"ACTIVATE_BLOCKS", kActivateBlocks},
                                   {"ACTIVATE_LAST", kActivateLast}});
  c["ChainContext"] = dict_of({{"NONE", kNoContext},
                               {"ADD", kAddContext},
                               {"JOINED", kJoinContext},
                               {"ACTIVATED", kActivateContext}});
}

void add_transport_codes(pybind11::dict& c) {
  using namespace pfk;
  c["SinkhornSchedule"] = dict_of(
      {{"ALTERNATING", kAlternating}, {"SYMMETRIC", kSymmetric}, {"ACCELERATED", kAccelerated}});
}

pybind11::dict codes() {
  pybind11::dict c;
  add_affine_codes(c);
  add_spline_codes(c);
  add_density_and_field_codes(c);
  add_network_codes(c);
  add_chain_codes(c);
  add_transport_codes(c);
  return c;
}

}  // namespace

PYBIND11_MODULE(_C, m) {
  m.doc() = "Build facts of pyflowkern.";
  m.def("codes", codes, "Return the enumerations that cross from Python to C++, by name.");
  m.def(
      "limits",
      [] {
        return dict_of({{"MOST_BINS", pfk::kMostBins}, {"MOST_MASKED_LAYERS", pfk::kMaxLayers}});
      },
      "Return the sizes up to which kernels take an argument, by name.");
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
