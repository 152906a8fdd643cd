"""The integers that cross from Python to C++, by name: kinds are counted from 0, flags are bits.

``csrc/core/codes.h`` has the same names and numbers, which ``_C.codes()`` shows; ``tests/core/test_codes.py`` compares
the two.  Ops are given plain integers (``.value``), which every compiler and exporter knows; inside of hot functions a
module makes constants of them once.
"""

from __future__ import annotations

from enum import Enum, IntEnum, IntFlag

__all__ = [
    "MOST_BINS",
    "MOST_MASKED_LAYERS",
    "AffineFlag",
    "ChainBase",
    "ChainContext",
    "ChainElementsFlag",
    "ChainLayerFlag",
    "ChainNetworkFlag",
    "ChainStep",
    "ElementFamily",
    "FieldActivation",
    "FieldFlag",
    "LayerFlag",
    "MaskedActivation",
    "ParamsLayout",
    "ScaleKind",
    "SinkhornSchedule",
    "SplineFlag",
    "SplineKind",
    "SplineParameterization",
    "SplineTails",
    "StructureHead",
    "StructureLayer",
    "WantedGradient",
    "numbered",
]

#: Sizes up to which kernels take an argument: bins of a spline, layers of a masked network.
MOST_BINS, MOST_MASKED_LAYERS = 64, 24


def numbered(kinds: type[Enum]) -> dict[str, int]:
    """Return the numbers of kinds by the names that public functions take, in the order of the numbers."""
    return {kind.name.lower(): kind.value for kind in kinds}


# --- affine transforms ----------------------------------------------------------------------------


class ScaleKind(IntEnum):
    """The map from a raw scale to a scale: see ``ops.ScaleMap``."""

    EXP = 0
    TANH = 1
    ATAN = 2
    SIGMOID = 3
    SOFTPLUS = 4
    SOFTCLIP = 5
    ADDITIVE = 6
    SOFTPLUS_ASINH = 7
    SOFTPLUS_TANH = 8


class ParamsLayout(IntEnum):
    """How shifts and raw scales lie in the parameters of an affine coupling."""

    BLOCKED = 0
    INTERLEAVED = 1
    FEATURE_MAJOR = 2
    BLOCKED_RAW_FIRST = 3
    INTERLEAVED_RAW_FIRST = 4
    FEATURE_MAJOR_RAW_FIRST = 5


class AffineFlag(IntFlag):
    """What an affine transform does besides its scale map."""

    INVERSE = 1
    SWAP = 2  # the first part of the channels is transformed
    SHIFT_FIRST = 4  # y = s (x + t)
    DIVIDE = 8  # 1 / s in place of s
    FROM_OUTPUT = 16  # the backward pass is given the output


# --- splines --------------------------------------------------------------------------------------


class SplineKind(IntEnum):
    """The function in a bin: see ``ops.SplineMap``, also for the next two."""

    RATIONAL_QUADRATIC = 0
    LINEAR = 1
    QUADRATIC = 2
    CUBIC = 3


class SplineTails(IntEnum):
    """What lies outside of the interval."""

    LINEAR = 0
    CIRCULAR = 1
    NONE = 2
    AFFINE = 3


class SplineParameterization(IntEnum):
    """How raw parameters become bins and derivatives."""

    SOFTMAX = 0
    SOFTCLIP = 1
    DOMAIN = 2


class SplineFlag(IntFlag):
    """What a spline op does besides its map."""

    INVERSE = 1
    ELEMENTWISE = 2  # a log-derivative of each element, not their sum
    SWAP = 4  # the first part of the channels is transformed
    COUPLING = 8  # a part of x is transformed, whose parameters lie channel by channel


# --- densities ------------------------------------------------------------------------------------


class WantedGradient(IntFlag):
    """The gradients that the backward pass of a normal density is to make."""

    Z = 1
    MEAN = 2
    LOG_STD = 4


# --- fields ---------------------------------------------------------------------------------------


class FieldActivation(IntEnum):
    """The activations of a vector field, which have second derivatives."""

    TANH = 0
    SOFTPLUS = 1
    SILU = 2
    GELU = 3


class FieldFlag(IntFlag):
    """What the ops of a field are to return, and how they run."""

    KEEP = 1  # what the backward pass needs
    IN_CACHE = 2  # all layers of a tile of samples before the next tile
    NORM = 4  # |J e|^2, too
    FLAT = 8  # one probe, whose trace has no axis of probes


# --- masked networks ------------------------------------------------------------------------------


class MaskedActivation(IntEnum):
    """The activations of a masked network."""

    IDENTITY = 0
    RELU = 1
    LEAKY_RELU = 2
    ELU = 3
    TANH = 4
    SIGMOID = 5
    SILU = 6
    GELU = 7
    SOFTPLUS = 8


class StructureHead(IntEnum):
    """Where in the structure of a masked network its own numbers stand; those of the layers follow."""

    FEATURES = 0
    OUTPUTS = 1  # numbers of a feature
    LEVELS = 2
    WIDEST = 3  # most features of a level


class StructureLayer(IntEnum):
    """Where in a layer's part of the structure its numbers stand."""

    SOURCE = 0  # the layer that is read, -1 for the input
    READS_ACTIVATED = 1  # its activated values (1) or its raw ones
    RESIDUAL = 2  # the layer whose raw values are added, -1 for none
    SEEN_THROUGH = 3  # the activation that others see this layer through
    FLAGS = 4


class LayerFlag(IntFlag):
    """What else is true of a layer."""

    KEEPS_RAW = 1  # another layer reads its raw values
    GATED = 2


class ElementFamily(IntEnum):
    """What the output of a masked network parametrizes: a scale map with a shift, or a spline."""

    AFFINE = 0
    SPLINE = 1


# --- chains of transforms -------------------------------------------------------------------------


class ChainStep(IntEnum):
    """The steps of a chain, one transform each: see ``ops.ChainProgram``."""

    PERMUTE = 0
    ACTNORM = 1
    LINEAR = 2
    PLU = 3
    SHIFT = 4
    ELEMENTS = 5
    LU = 6


class ChainBase(IntEnum):
    """The density of which a chain adds the logarithm at its end."""

    NONE = 0
    NORMAL = 1


class ChainLayerFlag(IntFlag):
    """How the weights of a network's layer are read, and what the layer does with a context."""

    MASKED = 1  # each row reads the first columns alone
    COLUMNS = 2  # columns are taken in an order that follows
    ROWS = 4  # rows likewise
    CONTEXT = 8  # a product with the context is added
    GATE = 16  # the sigmoid of a product with the context is a factor
    CONTEXT_BIAS = 32  # the product that is added has a bias of its own


class ChainElementsFlag(IntFlag):
    """What is done to the elements of a step besides their maps."""

    CENTRED = 1  # the log-scales of a sample have mean 0
    TURNED = 2  # before a spline, features are turned by half a circle as long as its interval


class ChainNetworkFlag(IntFlag):
    """The form of a network."""

    RESIDUAL = 1  # pairs of layers are blocks
    ACTIVATE_BLOCKS = 2  # an activation precedes the first layer of each block
    ACTIVATE_LAST = 4  # and the last layer


class ChainContext(IntEnum):
    """What the first layer of a network does with the context."""

    NONE = 0
    ADD = 1
    JOINED = 2
    ACTIVATED = 3


# --- transport ------------------------------------------------------------------------------------


class SinkhornSchedule(IntEnum):
    """The order in which an iteration updates the two potentials."""

    ALTERNATING = 0
    SYMMETRIC = 1
    ACCELERATED = 2
