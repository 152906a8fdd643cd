// SPDX-License-Identifier: Apache-2.0
// The integers that cross from Python to C++, by name: kinds are counted from 0, flags are bits.
// pyflowkern/core/codes.py has the same names and numbers; `_C.codes` (bindings.cpp) shows these
// to the test that compares the two.
#pragma once

namespace pfk {

// ---- affine transforms --------------------------------------------------------------------------
enum ScaleKind : int {
  kExp,
  kTanh,
  kAtan,
  kSigmoid,
  kSoftplus,
  kSoftclipScale,
  kAdditive,
  kSoftplusAsinh,
  kSoftplusTanh
};
constexpr int kScaleKinds = kSoftplusTanh + 1;

// How shifts and raw scales lie in the parameters of a coupling: shifts first, or, with kRawFirst
// added, raw scales first.
enum ParamsLayout : int { kBlocked, kInterleaved, kFeatureMajor, kRawFirst };
constexpr int kParamsLayouts = 2 * kRawFirst;

enum AffineFlags : int { kInverse = 1, kSwap = 2, kShiftFirst = 4, kDivide = 8, kFromOutput = 16 };
constexpr int kAllAffineFlags = 2 * kFromOutput - 1;

// ---- splines ------------------------------------------------------------------------------------
enum SplineKind : int { kRational, kLinearSpline, kQuadratic, kCubic };
constexpr int kSplineKinds = kCubic + 1;
enum SplineTails : int { kIdentityTails, kCircular, kNoTails, kAffineTails };
constexpr int kSplineTails = kAffineTails + 1;
enum SplineParameters : int { kSoftmax, kSoftclip, kDomain };
constexpr int kSplineParameters = kDomain + 1;
enum SplineFlags : int {
  kSplineInverse = 1,
  kSplineElementwise = 2,
  kSplineSwap = 4,
  kSplineCoupling = 8
};
constexpr int kAllSplineFlags = 2 * kSplineCoupling - 1;
constexpr int kMostBins = 64;

// ---- densities ----------------------------------------------------------------------------------
enum WantedGrads : int { kGradZ = 1, kGradMean = 2, kGradLogStd = 4 };
constexpr int kAllGrads = 2 * kGradLogStd - 1;

// ---- fields -------------------------------------------------------------------------------------
enum ActivationKind : int { kActTanh, kActSoftplus, kActSilu, kActGelu };
constexpr int kActivations = kActGelu + 1;
// kFieldFlat: one probe, whose trace has no axis of probes.
enum FieldFlags : int { kFieldKeep = 1, kFieldInCache = 2, kFieldNorm = 4, kFieldFlat = 8 };
constexpr int kAllFieldFlags = 2 * kFieldFlat - 1;

// ---- masked networks ----------------------------------------------------------------------------
enum class Activation : int {
  kIdentity,
  kRelu,
  kLeakyRelu,
  kElu,
  kTanh,
  kSigmoid,
  kSilu,
  kGelu,
  kSoftplus
};
constexpr int kMaskedActivations = static_cast<int>(Activation::kSoftplus) + 1;

// The structure of a network is kHead numbers, then kEach for each layer.
enum StructureHead : int { kFeatures, kOutputs, kLevels, kWidest, kHead };
enum StructureLayer : int {
  kSource,          // the layer that is read, -1: the input
  kReadsActivated,  // its activated or its raw values
  kResidual,        // the layer whose raw values are added, -1: none
  kSeenThrough,     // the activation that others see this layer through
  kLayerFlags,
  kEach
};
constexpr int kMaxLayers = 24;
enum LayerFlags : int { kKeepsRaw = 1, kGated = 2 };
constexpr int kAllLayerFlags = 2 * kGated - 1;

// What a masked network's output parametrizes.
enum ElementFamily : int { kAffineElements, kSplineElements };
constexpr int kElementFamilies = kSplineElements + 1;

// ---- chains of transforms -----------------------------------------------------------------------
enum ChainStepKind : int {
  kPermuteStep,
  kActNormStep,
  kLinearStep,
  kPluStep,
  kShiftStep,
  kElementsStep,
  kLuStep
};
constexpr int kChainSteps = kLuStep + 1;
enum ChainBase : int { kNoBase, kNormalBase };
constexpr int kChainBases = kNormalBase + 1;
// kLayerColumns, kLayerRows: columns or rows are taken in an order that follows.
// kLayerContext: a product with the context is added, kLayerContextBias: and a bias of its own;
// kLayerGate: its sigmoid is a factor.
enum ChainLayerFlags : int {
  kLayerMasked = 1,
  kLayerColumns = 2,
  kLayerRows = 4,
  kLayerContext = 8,
  kLayerGate = 16,
  kLayerContextBias = 32
};
constexpr int kAllChainLayerFlags = 2 * kLayerContextBias - 1;
// kCentredElements: log-scales of a sample have mean 0; kTurnedElements: before a spline, features
// are turned by half a circle as long as its interval.
enum ChainElementsFlags : int { kCentredElements = 1, kTurnedElements = 2 };
constexpr int kAllChainElementsFlags = 2 * kTurnedElements - 1;
// kResidualNetwork: pairs of layers are blocks; kActivateBlocks, kActivateLast: an activation
// precedes the first layer of each block, and the last layer.
enum ChainNetworkFlags : int { kResidualNetwork = 1, kActivateBlocks = 2, kActivateLast = 4 };
constexpr int kAllChainNetworkFlags = 2 * kActivateLast - 1;
// What the first layer of a network does with the context c: it adds C c, reads it as its last
// inputs, or adds a(C c + d).
enum ChainContext : int { kNoContext, kAddContext, kJoinContext, kActivateContext };
constexpr int kChainContexts = kActivateContext + 1;

// ---- transport ----------------------------------------------------------------------------------
enum SinkhornSchedule : int { kAlternating, kSymmetric, kAccelerated };
constexpr int kSinkhornSchedules = kAccelerated + 1;

}  // namespace pfk
