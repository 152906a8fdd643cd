"""Public ops: each a fused kernel with a pure-PyTorch reference beside it."""

from pyflowkern import _library
from pyflowkern.ops import field_loss, field_time  # noqa: F401  (ops that fields call)
from pyflowkern.ops.actnorm import (
    actnorm,
    actnorm_reference,
    channel_moments,
    channel_moments_reference,
)
from pyflowkern.ops.affine import (
    affine,
    affine_coupling,
    affine_coupling_reference,
    affine_reference,
    channel_split_sizes,
    checkerboard_mask,
)
from pyflowkern.ops.autoregressive import (
    autoregressive_inverse,
    autoregressive_inverse_reference,
)
from pyflowkern.ops.chain import chain, chain_reference
from pyflowkern.ops.chain_network import ChainLayer, ChainNetwork
from pyflowkern.ops.chain_program import ChainProgram
from pyflowkern.ops.chain_steps import (
    ActNormStep,
    ElementsStep,
    LinearStep,
    LUStep,
    PermuteStep,
    PLUStep,
    ShiftStep,
)
from pyflowkern.ops.conv_network import conv_network, conv_network_reference
from pyflowkern.ops.density import (
    bits_per_dim,
    bits_per_dim_reference,
    normal_log_prob,
    normal_log_prob_reference,
)
from pyflowkern.ops.diffusion import (
    add_noise,
    add_noise_reference,
    euler_maruyama,
    euler_maruyama_reference,
)
from pyflowkern.ops.field import (
    field_divergence,
    field_divergence_reference,
    hutchinson_trace,
    hutchinson_trace_reference,
)
from pyflowkern.ops.field_layer import field_layer, field_layer_reference
from pyflowkern.ops.linear import (
    glow_step,
    glow_step_reference,
    invertible_linear,
    invertible_linear_reference,
)
from pyflowkern.ops.masked_plan import MaskedLayer, MaskedPlan
from pyflowkern.ops.matrix import (
    householder_matrix,
    householder_matrix_reference,
    plu_matrix,
    plu_matrix_reference,
    slogdet_inverse,
    slogdet_inverse_reference,
)
from pyflowkern.ops.preprocess import (
    dequantize,
    dequantize_reference,
    logit,
    logit_reference,
    quantize,
    quantize_reference,
)
from pyflowkern.ops.probe import draw_probe, rademacher
from pyflowkern.ops.relu_network import relu_network, relu_network_reference
from pyflowkern.ops.runge_kutta import (
    rk_combine,
    rk_combine_reference,
    rk_error,
    rk_error_reference,
)
from pyflowkern.ops.scale_map import ScaleMap, scale_map
from pyflowkern.ops.spline import (
    rational_quadratic_spline,
    rational_quadratic_spline_reference,
    spline,
    spline_coupling,
    spline_coupling_reference,
    spline_reference,
)
from pyflowkern.ops.spline_map import SplineMap
from pyflowkern.ops.transport import (
    Sinkhorn,
    plan_draw,
    plan_draw_reference,
    plan_product,
    plan_product_reference,
    sinkhorn,
    sinkhorn_reference,
)

__all__ = [
    "ActNormStep",
    "ChainLayer",
    "ChainNetwork",
    "ChainProgram",
    "ElementsStep",
    "LUStep",
    "LinearStep",
    "MaskedLayer",
    "MaskedPlan",
    "PLUStep",
    "PermuteStep",
    "ScaleMap",
    "ShiftStep",
    "Sinkhorn",
    "SplineMap",
    "actnorm",
    "actnorm_reference",
    "add_noise",
    "add_noise_reference",
    "affine",
    "affine_coupling",
    "affine_coupling_reference",
    "affine_reference",
    "autoregressive_inverse",
    "autoregressive_inverse_reference",
    "bits_per_dim",
    "bits_per_dim_reference",
    "chain",
    "chain_reference",
    "channel_moments",
    "channel_moments_reference",
    "channel_split_sizes",
    "checkerboard_mask",
    "conv_network",
    "conv_network_reference",
    "dequantize",
    "dequantize_reference",
    "draw_probe",
    "euler_maruyama",
    "euler_maruyama_reference",
    "field_divergence",
    "field_divergence_reference",
    "field_layer",
    "field_layer_reference",
    "glow_step",
    "glow_step_reference",
    "householder_matrix",
    "householder_matrix_reference",
    "hutchinson_trace",
    "hutchinson_trace_reference",
    "invertible_linear",
    "invertible_linear_reference",
    "logit",
    "logit_reference",
    "normal_log_prob",
    "normal_log_prob_reference",
    "plan_draw",
    "plan_draw_reference",
    "plan_product",
    "plan_product_reference",
    "plu_matrix",
    "plu_matrix_reference",
    "quantize",
    "quantize_reference",
    "rademacher",
    "rational_quadratic_spline",
    "rational_quadratic_spline_reference",
    "relu_network",
    "relu_network_reference",
    "rk_combine",
    "rk_combine_reference",
    "rk_error",
    "rk_error_reference",
    "scale_map",
    "sinkhorn",
    "sinkhorn_reference",
    "slogdet_inverse",
    "slogdet_inverse_reference",
    "spline",
    "spline_coupling",
    "spline_coupling_reference",
    "spline_reference",
]

_library.load()
