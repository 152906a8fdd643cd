"""Bijections as modules: both directions return ``(tensor, log_det)``."""

from pyflowkern.nn._base import Bijection, BijectionTransform, Sequential
from pyflowkern.nn.conditioners import MLP, ConvNet, ResidualConvNet, ResidualMLP
from pyflowkern.nn.coupling import (
    AdditiveCoupling,
    AffineCoupling,
    Conditioner,
    Split,
    channel_mask,
    checkerboard_mask,
)
from pyflowkern.nn.glow import GlowStep
from pyflowkern.nn.linear import InvertibleConv1x1, InvertibleLinear
from pyflowkern.nn.multiscale import MultiScale
from pyflowkern.nn.normalization import ActNorm
from pyflowkern.nn.preprocess import Dequantize, Logit
from pyflowkern.nn.reshape import Permutation, Reverse, Squeeze
from pyflowkern.nn.vector_field import VectorField, VectorFieldMLP

__all__ = [
    "MLP",
    "ActNorm",
    "AdditiveCoupling",
    "AffineCoupling",
    "Bijection",
    "BijectionTransform",
    "Conditioner",
    "ConvNet",
    "Dequantize",
    "GlowStep",
    "InvertibleConv1x1",
    "InvertibleLinear",
    "Logit",
    "MultiScale",
    "Permutation",
    "ResidualConvNet",
    "ResidualMLP",
    "Reverse",
    "Sequential",
    "Split",
    "Squeeze",
    "VectorField",
    "VectorFieldMLP",
    "channel_mask",
    "checkerboard_mask",
]
