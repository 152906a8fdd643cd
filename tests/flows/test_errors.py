"""Wrong arguments raise errors that name the argument, what was wanted and what was given."""

import pytest
import torch

from pyflowkern import flows, nn


@pytest.mark.parametrize("build", [flows.Glow, flows.RealNVP])
@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        (
            (3, 12, 12),
            {"levels": 3},
            r"divisible by 2\^levels = 8 for levels=3, got \(3, 12, 12\)",
        ),
        (0, {}, "event_shape must be .* got 0"),
        ((), {}, r"event_shape must be .* got \(\)"),
        ((3, 0, 4), {}, r"event_shape must be .* got \(3, 0, 4\)"),
        ((3, 2.5), {}, r"event_shape must be .* got \(3, 2.5\)"),
        ((1, 2, 2, 2, 2), {}, "at most 3 spatial axes"),
        ((3, 8, 8), {"levels": 0}, "levels must be at least 1, got 0"),
        (4, {"steps": 0}, "steps must be at least 1, got 0"),
        (4, {"hidden": 0}, "hidden must be at least 1, got 0"),
        (4, {"context_features": -1}, "context_features must be at least 0, got -1"),
        ((3, 8, 8), {"bits": 9}, "bits must be 1 to 8, got 9"),
        ((3, 8, 8), {"bits": 8, "alpha": 0.7}, r"alpha must be in \[0, 0.5\), got 0.7"),
        (4, {"scale_map": "cube"}, "scale_map .* 'cube'"),
    ],
)
def test_builders(build, shape, options, message):
    with pytest.raises(ValueError, match=message):
        build(shape, **{"levels": 1, "steps": 1, "hidden": 4, **options})


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: flows.RealNVP(4, hidden=2.5), "hidden must be an int, got float"),
        (lambda: flows.Glow((3, 8, 8), levels="2"), "levels must be an int, got str"),
        (lambda: flows.RealNVP(4, steps=True), "steps must be an int, got bool"),
        (lambda: flows.Glow((3, 8, 8), levels=1, bits=7.5), "bits must be an int, got float"),
        (lambda: flows.Flow(torch.nn.ReLU(), (2,)), "bijection must be a nn.Bijection, got ReLU"),
        (lambda: flows.Flow(nn.ActNorm(2), (2,), base=3), "base must have a method log_prob"),
    ],
)
def test_wrong_types(build, message):
    with pytest.raises(TypeError, match=message):
        build()


@pytest.fixture(scope="module")
def flow():
    return flows.RealNVP(3, steps=1, hidden=4)


@pytest.fixture(scope="module")
def conditional():
    return flows.RealNVP(3, steps=1, hidden=4, context_features=2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda f: f(torch.zeros(2, 4)), ValueError, r"x must have shape \[N, 3\], got \(2, 4\)"),
        (lambda f: f(torch.zeros(3)), ValueError, r"x must have shape \[N, 3\], got \(3,\)"),
        (lambda f: f([1.0]), TypeError, "x must be a torch.Tensor, got list"),
        (
            lambda f: f(torch.zeros(2, 3).int()),
            TypeError,
            r"x must be torch.float32 .*torch.int32",
        ),
        (
            lambda f: f(torch.zeros(2, 3, dtype=torch.uint8)),
            TypeError,
            "uint8 in a flow made with bits=8",
        ),
        (
            lambda f: f(torch.zeros(2, 3).double()),
            TypeError,
            "x must have the flow's dtype torch.float32, got torch.float64",
        ),
        (lambda f: f.inverse(torch.zeros(2, 4)), ValueError, r"z must have shape \[N, 3\]"),
        (
            lambda f: f.inverse(torch.zeros(2, 3).double()),
            TypeError,
            "z must have the flow's dtype",
        ),
        (
            lambda f: f.log_prob(torch.zeros(2, 3), torch.zeros(2, 1)),
            ValueError,
            "context_features=0",
        ),
        (lambda f: f.sample(-1), ValueError, "n must be at least 0, got -1"),
        (lambda f: f.sample(2.5), TypeError, "n must be an int, got float"),
        (
            lambda f: f.sample(2, temperature=-1),
            ValueError,
            "temperature must be finite and at least 0, got -1",
        ),
        (lambda f: f.sample(2, temperature=float("nan")), ValueError, "temperature .* got nan"),
        (lambda f: f.inverse([[1.0]]), TypeError, "z must be a torch.Tensor, got list"),
        (lambda f: f.split_latents(torch.zeros(2, 4)), ValueError, r"z must .* \[N, 3\]"),
        (lambda f: f.interpolate([1.0], [2.0], 2), TypeError, "x0 must be a torch.Tensor"),
        (lambda f: f.sample(2, quantized=True), ValueError, "quantized=True needs .* bits"),
        (
            lambda f: f.interpolate(torch.zeros(2, 3), torch.zeros(2, 3), 1),
            ValueError,
            "steps must be at least 2, got 1",
        ),
        (
            lambda f: f.interpolate(torch.zeros(2, 3), torch.zeros(1, 3), 2),
            ValueError,
            r"x0 and x1 must have one shape, got \(2, 3\) and \(1, 3\)",
        ),
    ],
)
def test_calls(flow, call, error, message):
    with pytest.raises(error, match=message):
        call(flow)


@pytest.mark.parametrize(
    ("context", "error", "message"),
    [
        (None, ValueError, r"context must have shape \(2, 2\), got None"),
        (torch.zeros(2, 3), ValueError, r"context must have shape \(2, 2\), got \(2, 3\)"),
        (torch.zeros(5, 2), ValueError, r"context must have shape \(2, 2\), got \(5, 2\)"),
        (torch.zeros(2, 2).int(), TypeError, "context must be torch.float32, got torch.int32"),
        (torch.zeros(2, 2).double(), TypeError, "context must have the flow's dtype"),
        ([[0.0, 0.0]] * 2, TypeError, "context must be a torch.Tensor, got list"),
    ],
)
def test_contexts(conditional, context, error, message):
    for call in (
        lambda: conditional(torch.zeros(2, 3), context),
        lambda: conditional.inverse(torch.zeros(2, 3), context),
        lambda: conditional.sample(2, context),
    ):
        with pytest.raises(error, match=message):
            call()


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"hiden": (8,)}, TypeError, "hiden: neither an argument of the flow nor a setting"),
        ({"hidden": 8}, TypeError, "hidden must be a sequence of ints, got 8"),
        ({"method": "rk5"}, ValueError, "method must be one of"),
        ({"rtol": -1.0}, ValueError, "rtol must be at least 0"),
        ({"step_size": 0.0}, ValueError, "step_size must be positive"),
        ({"control": "sample", "adjoint": "reversible"}, ValueError, "control='sample'"),
        ({"duration": "1"}, TypeError, "duration must be a number, got str"),
    ],
)
def test_continuous_flows_check_the_settings_of_their_solver_at_construction(
    settings, error, message
):
    with pytest.raises(error, match=message):
        flows.CNF(2, **settings)


@pytest.mark.parametrize("flow", [flows.CNF, flows.FFJORD, flows.FlowMatching])
@pytest.mark.parametrize(
    "fields", [{}, {"conv": True}, {"conv": "unet"}, {"field": lambda size: torch.nn.Identity()}]
)
@pytest.mark.parametrize("name", ["time", "activation"])
def test_names_are_checked_also_where_a_field_has_no_use_for_them(flow, fields, name):
    with pytest.raises(ValueError, match=f"{name} must be one of .*, got 'bogus'"):
        flow((1, 4, 4), (4,), **fields, **{name: "bogus"})


def test_continuous_flows_take_a_tolerance_for_each_part_and_are_made_on_meta():
    flow = flows.CNF(2, (4,), rtol=(1e-3, 1e-2), atol=(1e-3, 1e-2))
    assert flow.log_prob(torch.zeros(3, 2)).isfinite().all()
    with torch.device("meta"):
        assert flows.CNF(2, (4,), control="sample").bijection is not None
