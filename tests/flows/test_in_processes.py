"""Flows in several processes, under torch's own wrappers: gradients of one process, and no silent mistake."""

import copy
import warnings
from datetime import timedelta
from pathlib import Path

import pytest
import ranks
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from cases.flows import FLOWS
from laws import normal
from torch.distributed.checkpoint.state_dict import get_state_dict, set_state_dict
from torch.distributed.fsdp import FSDPModule, fully_shard, register_fsdp_forward_method
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pyflowkern import flows, nn
from pyflowkern.nn._again import Call

CASES = {case.name: case for case in FLOWS}
FIXED = {"divergence": "exact", "method": "rk4", "step_size": 0.5}
#: New flows, whose layers start from their first batch.
FRESH = {
    "Glow": lambda: flows.Glow((1, 4, 4), levels=2, steps=1, hidden=4),
    "RealNVP": lambda: flows.RealNVP(4, steps=2, hidden=8),
    "MAF": lambda: flows.MAF(4, transforms=2, hidden=(8,), batch_norm=True),
    "CNF": lambda: flows.CNF(4, (8,), **FIXED),
}
METHODS = ("log_prob", "sample", "sample_and_log_prob", "inverse")


def fresh_flow(name):
    torch.manual_seed(1)
    return FRESH[name]().double()


def both(flow):
    return normal(12, *flow.event_shape) * 3 + 5


def mine(x):
    return x.chunk(dist.get_world_size())[dist.get_rank()]


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def close(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-9, rtol=1e-9)


# --- what runs in two processes ---------------------------------------------------------------------


def likelihood():
    """Gradients and starts of layers are those of one process with the batches of both."""
    for name in FRESH:
        alone, flow = fresh_flow(name), fresh_flow(name)
        loss = flows.NegativeLogLikelihood(alone)
        wrapped = DistributedDataParallel(flows.NegativeLogLikelihood(flow))
        for _ in range(2):
            loss(both(alone)).backward()
            wrapped(mine(both(flow))).backward()
        for (key, p), q in zip(alone.named_parameters(), flow.parameters(), strict=True):
            torch.testing.assert_close(q.grad, p.grad, atol=1e-9, rtol=1e-9, msg=f"{name} {key}")
        for p, q in zip(alone.buffers(), flow.buffers(), strict=True):
            close(q.double(), p.double())


def direct_calls():
    """A call past the wrapper, whose gradients nobody averages, is noticed; others are not."""
    for wrap in (lambda flow: flow, flows.NegativeLogLikelihood):
        flow = fresh_flow("RealNVP")
        x = mine(both(flow))
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flow.log_prob(x)  # not wrapped yet
            wrapped = DistributedDataParallel(wrap(flow))
            wrapped(x)
            with torch.no_grad():
                flow.log_prob(x)
            flow.eval().log_prob(x)
            copy.deepcopy(flow).train().log_prob(x)
        with pytest.warns(RuntimeWarning, match="RealNVP lies in a DistributedDataParallel"):
            flow.train().log_prob(x)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            flow.log_prob(x)  # once
    flow = fresh_flow("RealNVP")
    flow.log_prob(x)  # layers start before anything is computed again
    wrapped = DistributedDataParallel(Again(flow))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        wrapped(x).backward()  # calls the flow again, outside of the wrapper's forward
    flow = fresh_flow("RealNVP")
    DistributedDataParallel(flow)  # is gone at once
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        flow.log_prob(x)


class Again(flows.NegativeLogLikelihood):
    def forward(self, x):
        return -checkpoint(self.flow.log_prob, x, use_reentrant=False).mean()


def shard(flow, steps):
    """Shard a flow, and each of its steps if asked, as docs/scale.md says."""
    units = [flow]
    if steps:
        units = [m for m in flow.modules() if isinstance(m, STEPS)] + units
    for unit in units:
        fully_shard(unit)
        for method in METHODS:
            if hasattr(unit, method):
                register_fsdp_forward_method(unit, method)
    return flow


STEPS = (
    nn.GlowStep,
    nn.AffineCoupling,
    nn.SplineCoupling,
    nn.MaskedAutoregressive,
    flows.ContinuousBijection,
)


def sharded(name, steps):
    """Values, samples and gradients are those of the flow in one process."""
    case = CASES[name]
    alone, x, context = case.make(n=4)
    flow = shard(case.make(n=4)[0], steps)
    assert any(isinstance(m, FSDPModule) for m in flow.modules())
    for _ in range(2):
        close(flow.log_prob(x, context), alone.log_prob(x, context))
        z = alone(x, context)[0].detach()
        close(flow(x, context)[0], alone(x, context)[0])
        close(flow.inverse(z, context)[0], alone.inverse(z, context)[0])
        found = []
        for each in (flow, alone):
            torch.manual_seed(3)
            found.append((each.sample(4, context), *each.sample_and_log_prob(4, context)))
        for a, b in zip(*found, strict=True):
            close(a, b)
    for each in (flow, alone):
        each.train()
        torch.manual_seed(dist.get_rank())
        (-each.log_prob(x, context).mean()).backward()
    for (key, p), q in zip(alone.named_parameters(), flow.parameters(), strict=True):
        expected = p.grad.clone()
        dist.all_reduce(expected)
        torch.testing.assert_close(whole(q.grad), expected / 2, atol=1e-8, rtol=1e-8, msg=key)


def remade(units):
    """Flows that keep no activations have the gradients of those that do, under both wrappers."""
    case = CASES["Glow three levels"]
    alone, x, context = case.make(n=8)
    flow, again = case.make(n=8)[0], []
    for part in flow.modules():
        if isinstance(part, nn.Sequential):
            part.memory = "reversible"
    loss = flows.NegativeLogLikelihood(flow)
    if units == "ddp":
        loss = DistributedDataParallel(loss)
    else:
        kind = {"flow": (), "sequences": nn.Sequential, "steps": STEPS}[units]
        for part in [m for m in flow.modules() if isinstance(m, kind)]:
            fully_shard(part)
        shard(flow, steps=False)
    original = Call.again
    Call.again = lambda *given: (again.append(1), original(*given))[1]
    try:
        for _ in range(2):
            for each in (alone.train(), flow.train()):
                each.zero_grad()
            loss(mine(x), mine(context)).backward()
            flows.NegativeLogLikelihood(alone)(x, context).backward()
            for (key, p), q in zip(alone.named_parameters(), flow.parameters(), strict=True):
                torch.testing.assert_close(whole(q.grad), p.grad, atol=1e-8, rtol=1e-8, msg=key)
    finally:
        Call.again = original
    assert again  # layers without parameters, where all others are sharded by themselves


def starts_sharded():
    """ActNorm starts from the batch of both processes, whichever module is sharded, through a registered method."""
    for steps in (False, True):
        alone, flow = fresh_flow("Glow"), shard(fresh_flow("Glow"), steps)
        alone.log_prob(both(alone))
        flow.log_prob(mine(both(flow)))
        for p, q in zip(alone.parameters(), flow.parameters(), strict=True):
            close(whole(q), p)


def parts_alone():
    """A part of a step that is sharded by itself gives the right number, or an error that names it and the remedy."""
    seen = set()
    for name in (
        "Glow image",
        "Glow dense",
        "NSF",
        "MAF on a mixture",
        "MAF with batch norm",
        "CNF",
    ):
        case = CASES[name]
        alone, x, context = case.make(n=4)
        z = alone(x, context)[0].detach()
        expected = {
            "log_prob": alone.log_prob(x, context),
            "inverse": alone.inverse(z, context)[0],
        }
        with_own = [type(m) for m in alone.modules() if [*m.parameters(recurse=False)]]
        for kind in dict.fromkeys(with_own):  # in the same order in all processes
            for method, argument in (("log_prob", x), ("inverse", z)):
                flow = case.make(n=4)[0]
                for part in [m for m in flow.modules() if type(m) is kind]:
                    fully_shard(part)
                shard(flow, steps=False)
                found, error = result_or_error(getattr(flow, method), argument, context)
                if error is None:
                    found = found[0] if method == "inverse" else found
                    torch.testing.assert_close(found, expected[method], atol=1e-6, rtol=1e-6)
                    continue
                seen.add((name, kind.__name__, method))
                path = error.split(" of the flow is sharded over processes")[0]
                assert type(flow.get_parameter(path)).__name__ == "DTensor", error
                assert "register_fsdp_forward_method(module, name)" in error
    assert ("Glow image", "InvertibleLinear", "inverse") in seen
    assert ("Glow dense", "InvertibleLinear", "inverse") in seen
    assert ("MAF on a mixture", "MixtureOfGaussians", "log_prob") in seen
    assert ("CNF", "FieldLinear", "log_prob") in seen


def result_or_error(function, *arguments):
    try:
        return function(*arguments), None
    except RuntimeError as error:
        return None, str(error)


def not_registered():
    flow, _, context = CASES["NSF"].make(n=4)
    fully_shard(flow)
    with pytest.raises(RuntimeError, match=r"bijection\..* of the flow is sharded .*'sample'"):
        flow.sample(4, context)
    flow, x, context = CASES["FlowMatching"].make(n=4)
    arguments = {"loss": (x, context), "velocity": (0.5, x, context)}
    for method, given in arguments.items():
        torch.manual_seed(1)
        expected = getattr(flow, method)(*given)
        other = fully_shard(copy.deepcopy(flow))
        with pytest.raises(RuntimeError, match=r"of the flow is sharded over processes"):
            getattr(other, method)(*given)
        register_fsdp_forward_method(other, method)
        torch.manual_seed(1)
        close(getattr(other, method)(*given), expected)


def other_errors():
    """An error that has nothing to do with shards is what it was, though the parameters of other steps are sharded."""
    flow, x, context = CASES["NSF"].make(n=4)
    shard(flow, steps=True)

    def refuse(*_):
        raise RuntimeError("this network is out of order")

    next(iter(flow.bijection)).register_forward_hook(refuse)
    with pytest.raises(RuntimeError, match=r"^this network is out of order$"):
        flow.log_prob(x, context)


def stepped(flow, x):
    """Take a step, and return the optimizer."""
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1, momentum=0.9)
    (-flow.log_prob(x).mean()).backward()
    optimizer.step()
    return optimizer


def saves(folder):
    """The state of a flow that is sharded over two processes, with its optimizer's."""
    flow = shard(fresh_flow("Glow"), steps=True)
    model, optimizer = get_state_dict(flow, stepped(flow, mine(both(flow))))
    dcp.save({"model": model, "optimizer": optimizer}, checkpoint_id=Path(folder) / "state")


def processes(folder):
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    likelihood()
    direct_calls()
    for name, steps in (("Glow three levels", True), ("NSF", True), ("MAF", False), ("CNF", True)):
        sharded(name, steps)
    for units in ("ddp", "flow", "sequences", "steps"):
        remade(units)
    starts_sharded()
    parts_alone()
    not_registered()
    other_errors()
    saves(folder)
    dist.destroy_process_group()


def loads(folder):
    """What two processes have saved is what four load."""
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    flow = shard(fresh_flow("Glow"), steps=True)
    check_loaded(flow, folder)
    dist.destroy_process_group()


def check_loaded(flow, folder):
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.1, momentum=0.9)
    state = dict(zip(("model", "optimizer"), get_state_dict(flow, optimizer), strict=True))
    dcp.load(state, checkpoint_id=Path(folder) / "state")
    set_state_dict(
        flow, optimizer, model_state_dict=state["model"], optim_state_dict=state["optimizer"]
    )
    alone = fresh_flow("Glow")
    expected = stepped(alone, both(alone))
    for p, q in zip(alone.parameters(), flow.parameters(), strict=True):
        close(whole(q), p)
        momenta = (each.state[t]["momentum_buffer"] for each, t in ((optimizer, q), (expected, p)))
        close(*map(whole, momenta))
    x = both(alone)
    close(flow.eval().log_prob(x), alone.eval().log_prob(x))


# --- the tests --------------------------------------------------------------------------------------


def test_two_processes_and_what_they_save(tmp_path):
    """One start runs all, because starting takes longer than running."""
    ranks.run(__file__, "processes", 2, tmp_path)
    check_loaded(fresh_flow("Glow"), tmp_path)  # in this one process
    ranks.run(__file__, "loads", 4, tmp_path)


def test_the_likelihood_is_that_of_the_flow():
    flow, x, context = CASES["NSF"].make(n=4)
    loss = flows.NegativeLogLikelihood(flow)
    assert torch.equal(loss(x, context), -flow.log_prob(x, context).mean())
    assert loss.flow is flow
    assert sorted(loss.state_dict()) == sorted(f"flow.{name}" for name in flow.state_dict())
    with pytest.raises(ValueError, match="x must have one sample at least"):
        loss(x[:0], context[:0])
    with pytest.raises(TypeError, match=r"flow must be a flows\.Flow, got Linear"):
        flows.NegativeLogLikelihood(torch.nn.Linear(2, 2))


@pytest.mark.parametrize("case", FLOWS, ids=str)
def test_parameters_are_contiguous(case):
    """As fully_shard wants them."""
    assert all(p.is_contiguous() for p in case.build().parameters())
