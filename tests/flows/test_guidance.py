"""Flow matching with classes and contexts that are left out at times: labels, guidance, learned conditional laws."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from pyflowkern import flows, nn

SOLVER = {"method": "rk4", "step_size": 0.25}


def make(classes: int = 3, **options) -> flows.FlowMatching:  # type: ignore[no-untyped-def]
    torch.manual_seed(0)
    return flows.FlowMatching(2, (8,), classes=classes, **(SOLVER | options))


LABELS = torch.tensor([0, 2, 1, 2])


def test_labels_are_one_hot_vectors() -> None:
    flow, x = make().eval(), torch.randn(4, 2)
    weights = torch.nn.functional.one_hot(LABELS, 4).float()  # the fourth is no class
    assert flow.context_features == 4
    for call in (flow.log_prob, flow.bits_per_dim, lambda x, c: flow.velocity(0.3, x, c)):
        torch.testing.assert_close(call(x, LABELS), call(x, weights))
    one = flow.log_prob(x, torch.tensor(2))
    torch.testing.assert_close(one, flow.log_prob(x, torch.full((4,), 2)))
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(x, torch.eye(4)[3]))
    assert not torch.allclose(one, flow.log_prob(x))
    z, _ = flow(x, LABELS)
    torch.testing.assert_close(flow.inverse(z, LABELS)[0], x, rtol=1e-3, atol=1e-3)


def test_labels_give_the_batch_shape_of_a_distribution() -> None:
    flow, x = make().eval(), torch.randn(5, 4, 2)
    law = flow.distribution(LABELS)
    assert law.sample((5,)).shape == (5, 4, 2)
    torch.testing.assert_close(law.log_prob(x)[1], flow.log_prob(x[1], LABELS))
    assert flow.transform(LABELS).log_abs_det_jacobian(x[0], x[0]).shape == (4,)
    assert flow.interpolate(x[0], x[1], 3, LABELS).shape == (3, 4, 2)


def test_without_a_context_it_is_the_unconditional_distribution() -> None:
    flow, x = make().eval(), torch.randn(4, 2)  # traces in training are estimates
    torch.testing.assert_close(flow.distribution().log_prob(x), flow.log_prob(x))
    assert flow.distribution().sample((3,)).shape == (3, 2)


@pytest.mark.parametrize("conv", [None, True, "unet"])
@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guided_samples_follow_the_guided_velocity(conv: object, weight: float) -> None:
    """Euler's steps by hand, with two evaluations where the flow takes one of both."""
    torch.manual_seed(0)
    solver = {"method": "euler", "step_size": 0.25}
    flow = flows.FlowMatching((1, 2, 3), (4,), classes=3, conv=conv, **solver).eval()
    with torch.no_grad():
        for p in flow.parameters():
            p += 0.3 * torch.randn_like(p)
    found = flow.sample(4, LABELS, guidance=weight, generator=torch.Generator().manual_seed(1))
    x = flow.base.sample(4, temperature=1.0, generator=torch.Generator().manual_seed(1))
    x = x.view(4, 1, 2, 3)
    with torch.no_grad():
        for k in range(4):
            without = flow.velocity(k / 4, x)
            given = flow.velocity(k / 4, x, LABELS)
            x = x + (without + weight * (given - without)) / 4
    torch.testing.assert_close(found, x, rtol=1e-4, atol=1e-5)


def test_a_guided_flow_shares_weights_and_knows_the_density_of_its_samples() -> None:
    flow = make().double().eval()
    guided = flow.guided(3.0)
    assert flow.guided(1) is flow
    assert {id(p) for p in guided.parameters()} == {id(p) for p in flow.parameters()}
    x, log_prob = guided.sample_and_log_prob(4, LABELS)
    torch.testing.assert_close(guided.log_prob(x, LABELS), log_prob, rtol=1e-3, atol=1e-3)
    assert not torch.allclose(flow.log_prob(x, LABELS), log_prob)
    torch.testing.assert_close(guided.log_prob(x), flow.log_prob(x))  # nothing to be guided by
    log_prob.sum().backward()
    assert all(p.grad is not None for p in next(flow.blocks()).field.parameters())


def test_one_evaluation_of_both_and_a_time_of_each_sample() -> None:
    flow, calls = make(method="dopri5", step_size=None, control="sample"), []
    field = next(flow.blocks()).field
    field.register_forward_hook(lambda m, args, out: calls.append(len(args[1])))
    assert flow.sample(4, LABELS, guidance=2.0).isfinite().all()
    assert set(calls) == {8}


def test_dropout_leaves_contexts_out_in_training_alone() -> None:
    flow, x1 = make(context_dropout=0.5), torch.randn(4000, 2)
    labels = torch.randint(3, (4000,))
    seen: list[Tensor] = []
    field = next(flow.blocks()).field
    field.register_forward_hook(lambda m, args, out: seen.append(args[2]))
    flow.loss(x1, labels)
    flow.eval().loss(x1, labels)
    dropped, kept = seen
    whole = torch.nn.functional.one_hot(labels, 4).float()
    assert torch.equal(kept, whole)
    gone = dropped[:, 3] == 1
    assert abs(gone.float().mean() - 0.5) < 5 * 0.5 / 4000**0.5
    assert torch.equal(dropped[~gone], whole[~gone])
    assert torch.equal(dropped[gone], torch.eye(4)[3].expand_as(dropped[gone]))


def test_contexts_are_left_out_for_a_learned_vector() -> None:
    torch.manual_seed(0)
    flow = flows.FlowMatching(2, (8,), context_features=3, context_dropout=0.3, **SOLVER)
    flow.loss(torch.randn(64, 2), torch.randn(64, 3)).backward()
    assert flow.null_context.grad.any()
    x, c = torch.randn(4, 2), torch.randn(4, 3)
    flow.eval()
    torch.testing.assert_close(flow.log_prob(x), flow.log_prob(x, flow.null_context.detach()))
    assert flow.sample(4, c, guidance=2.0).shape == (4, 2)
    plain = flows.FlowMatching(2, (8,), context_features=3)
    assert "null_context" not in plain.state_dict()


def test_the_loss_with_classes_compiles_to_one_graph() -> None:
    flow, x1, x0 = make(), torch.randn(4, 2), torch.randn(4, 2)
    compiled = torch.compile(flow.loss, fullgraph=True, backend="aot_eager")
    torch.manual_seed(0)
    got = compiled(x1, LABELS, x0=x0)
    torch.manual_seed(0)
    torch.testing.assert_close(got, flow.loss(x1, LABELS, x0=x0))
    assert compiled(x1, LABELS + 2, x0=x0).isnan()  # labels cannot be looked at there


def test_classes_are_learned() -> None:
    """Three Gaussians with closed forms: samples and densities of each class, and of the mixture without one."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(2)
    means = torch.tensor([[-2.0, 0.0], [2.0, 0.0], [0.0, 3.0]])
    flow = flows.FlowMatching(
        2, (48, 48), activation="silu", classes=3, method="rk4", step_size=0.1
    )
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        labels = torch.randint(3, (256,), generator=draw)
        x1 = means[labels] + 0.5 * torch.randn(256, 2, generator=draw)
        optimizer.zero_grad()
        flow.loss(x1, labels).backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    for label, mean in enumerate(means):
        labels = torch.full((500,), label)
        x = flow.sample(500, labels, generator=draw)
        assert (x.mean(0) - mean).abs().max() < 0.15
        assert (x.std(0) - 0.5).abs().max() < 0.1
        law = torch.distributions.MultivariateNormal(mean, 0.25 * torch.eye(2))
        y = law.sample((200,))
        gap = law.log_prob(y) - flow.log_prob(y, labels[:200]).detach()
        assert gap.mean().abs() < 0.1  # the KL divergence, in nats
    mixture = flow.sample(1500, generator=draw)
    nearest = torch.cdist(mixture, means).argmin(1).bincount(minlength=3) / 1500
    assert (nearest - 1 / 3).abs().max() < 0.1


def test_a_conditional_gaussian_is_learned() -> None:
    """x given c is N(A c, 0.3^2): samples and densities for contexts that were never seen."""
    torch.manual_seed(0)
    draw = torch.Generator().manual_seed(3)
    slope = torch.tensor([[1.0, -0.5], [0.5, 1.0]])
    options = {"context_features": 2, "activation": "silu", "method": "rk4", "step_size": 0.1}
    flow = flows.FlowMatching(2, (48, 48), **options)
    optimizer = torch.optim.Adam(flow.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 500)
    for _ in range(500):
        c = torch.randn(256, 2, generator=draw)
        x1 = c @ slope.T + 0.3 * torch.randn(256, 2, generator=draw)
        optimizer.zero_grad()
        flow.loss(x1, c).backward()
        optimizer.step()
        schedule.step()
    flow.eval()
    for c in (torch.tensor([0.5, -1.0]), torch.tensor([-1.0, 0.3])):
        law = torch.distributions.MultivariateNormal(slope @ c, 0.09 * torch.eye(2))
        x = flow.sample(800, c, generator=draw)
        assert (x.mean(0) - law.mean).abs().max() < 0.1
        assert (x.std(0) - 0.3).abs().max() < 0.06
        y = law.sample((200,))
        assert (law.log_prob(y) - flow.log_prob(y, c).detach()).mean().abs() < 0.1


X = torch.randn(4, 2)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (
            lambda: make().loss(X, LABELS + 1),
            ValueError,
            "context must be labels from 0 to 2, .* 3",
        ),
        (lambda: make().log_prob(X, LABELS - 1), ValueError, "from 0 to 2, one of them is -1"),
        (lambda: make().sample(4, torch.tensor(7)), ValueError, "from 0 to 2, one of them is 7"),
        (
            lambda: make().loss(X, LABELS.int()),
            TypeError,
            "labels of torch.int64, got torch.int32",
        ),
        (lambda: make(5).loss(X, LABELS.float()), TypeError, "int64, got torch.float32"),
        (lambda: make().loss(X, LABELS > 1), TypeError, "int64, got torch.bool"),
        (lambda: make().loss(X, LABELS[:3]), ValueError, r"labels of shape \(4,\), got \(3,\)"),
        (lambda: make().loss(X, LABELS[:, None]), TypeError, r"labels \(4,\) of torch.int64"),
        (lambda: make().loss(X, [0, 1, 2, 0]), TypeError, "context must be a torch.Tensor"),
        (lambda: make().loss(X), ValueError, "context must have shape"),
        (lambda: make(context_dropout=0.0).sample(4), ValueError, "context must have shape"),
        (lambda: make().sample(4, LABELS, guidance="2"), TypeError, "guidance must be a number"),
        (
            lambda: make().sample(4, LABELS, guidance=math.inf),
            ValueError,
            "guidance must be finite",
        ),
        (
            lambda: make(context_dropout=0).sample(4, LABELS, guidance=2),
            ValueError,
            "guidance must be 1",
        ),
        (lambda: flows.FlowMatching(2).sample(4, guidance=2.0), ValueError, "guidance must be 1"),
        (lambda: make().guided(math.nan), ValueError, "weight must be finite"),
        (lambda: make(activation=""), ValueError, "activation must be one of"),
        (lambda: make(context_features=2), ValueError, "context_features must be 0 with classes"),
        (
            lambda: make(context_dropout=1.0),
            ValueError,
            "context_dropout must be from 0 to below 1",
        ),
        (lambda: make(context_dropout="a"), TypeError, "context_dropout must be a number"),
        (lambda: make(classes=-1), ValueError, "classes must be at least 0"),
        (lambda: make(classes=2.0), TypeError, "classes must be an int"),
        (
            lambda: flows.FlowMatching(2, context_dropout=0.1),
            ValueError,
            "context_dropout must be 0 without",
        ),
        (
            lambda: make(field=lambda d: nn.VectorFieldMLP(d)),
            ValueError,
            "context_features=4, got 0",
        ),
    ],
)
def test_wrong_arguments_are_named(call, error, message) -> None:  # type: ignore[no-untyped-def]
    with pytest.raises(error, match=message):
        call()
