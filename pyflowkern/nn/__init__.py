"""Bijections as modules: both directions return ``(tensor, log_det)``."""

from pyflowkern.nn._base import Bijection, BijectionTransform, Sequential
from pyflowkern.nn.autoregressive import Inverse, MaskedAutoregressive
from pyflowkern.nn.batch_norm import BatchNorm
from pyflowkern.nn.conditioners import (
    MLP,
    ConvNet,
    PeriodicInput,
    ResidualConvNet,
    ResidualMLP,
)
from pyflowkern.nn.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Conditioner,
    Split,
    channel_mask,
    checkerboard_mask,
)
from pyflowkern.nn.gin import GINCoupling
from pyflowkern.nn.glow import GlowStep
from pyflowkern.nn.identity import start_as_identity
from pyflowkern.nn.jacobi import jacobi_inverse
from pyflowkern.nn.linear import InvertibleConv1x1, InvertibleLinear
from pyflowkern.nn.masked import MaskedMLP
from pyflowkern.nn.mixed_spline import MixedSplineCoupling
from pyflowkern.nn.multiscale import MultiScale
from pyflowkern.nn.normalization import ActNorm
from pyflowkern.nn.preprocess import Dequantize, Logit
from pyflowkern.nn.reshape import Permutation, Reverse, Squeeze
from pyflowkern.nn.spline import CircularShift, SplineCoupling
from pyflowkern.nn.standardize import Standardize
from pyflowkern.nn.vector_field import VectorField, VectorFieldMLP
from pyflowkern.nn.vector_field_conv import VectorFieldConv
from pyflowkern.nn.vector_field_unet import VectorFieldUNet

__all__ = [
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "BatchNorm",
    "Bijection",
    "BijectionTransform",
    "CircularShift",
    "Conditioner",
    "ConvNet",
    "Dequantize",
    "GINCoupling",
    "GlowStep",
    "Inverse",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "Logit",
    "MaskedAutoregressive",
    "MaskedMLP",
    "MixedSplineCoupling",
    "MultiScale",
    "PeriodicInput",
    "Permutation",
    "ResidualConvNet",
    "ResidualMLP",
    "Reverse",
    "Sequential",
    "SplineCoupling",
    "Split",
    "Squeeze",
    "Standardize",
    "VectorField",
    "VectorFieldConv",
    "VectorFieldMLP",
    "VectorFieldUNet",
    "channel_mask",
    "checkerboard_mask",
    "jacobi_inverse",
    "start_as_identity",
]
