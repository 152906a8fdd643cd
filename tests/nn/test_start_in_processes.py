"""Statistics in several processes: those of all where they train one model, independent otherwise."""

import copy
import io
from datetime import timedelta

import ranks
import torch
import torch.distributed as dist
from laws import normal
from torch.distributed.algorithms.join import Join
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel
from torch.utils.checkpoint import checkpoint

from pyflowkern import nn

C = 3  # does not divide by the number of processes


def batch(rank):
    """Batches of different sizes and means."""
    return normal(10 + 20 * rank, C, seed=rank).float() * 4 + 100 * rank


def both():
    return torch.cat([batch(0), batch(1)])


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.ActNorm(C), nn.InvertibleLinear(C), nn.ActNorm(C))


def loss_of(result):
    z, log_det = result
    return (z.square().sum(1) / 2 - log_det).mean()


def expect_start_of_both(state):
    alone = model()
    alone(both())
    expected = alone.state_dict()
    for name in expected:
        torch.testing.assert_close(state[name], expected[name], atol=1e-5, rtol=1e-5)


def ddp(rank, kind):
    wrapped = DistributedDataParallel(model(), broadcast_buffers=kind == "buffers")
    loss_of(wrapped(batch(rank))).backward()
    expect_start_of_both(wrapped.module.state_dict())


def two_passes_in_ddp(rank, kind):
    """Afterwards nothing is communicated: one process alone may go on."""
    wrapped = DistributedDataParallel(model())
    (loss_of(wrapped(batch(rank))) + loss_of(wrapped(batch(1 - rank)))).backward()
    if rank == 0:
        for module in (wrapped.module, copy.deepcopy(wrapped.module)):
            module.train()(batch(0))


def sharded(rank, kind):
    flow = model()
    mesh = dist.init_device_mesh("cpu", (2,))
    if kind == "two axes":
        mesh = dist.init_device_mesh("cpu", (2, 1), mesh_dim_names=("copies", "parts"))
    if kind == "each layer":
        for layer in flow.layers:
            fully_shard(layer)
    fully_shard(flow, **({} if kind == "each layer" else {"mesh": mesh}))
    optimizer = torch.optim.SGD(flow.parameters(), lr=0.0)
    loss_of(flow(batch(rank))).backward()
    optimizer.step()
    expect_start_of_both({k: whole(v) for k, v in flow.state_dict().items()})
    z = flow(batch(rank))[0].detach()
    gathered = [torch.zeros(10 + 20 * i, C) for i in range(2)]
    gather(gathered, z, rank)
    z = torch.cat(gathered).double()
    torch.testing.assert_close(z.mean(0), torch.zeros(C).double(), atol=1e-4, rtol=0)
    torch.testing.assert_close(z.std(0, correction=0), torch.ones(C).double(), atol=1e-3, rtol=0)


def gather(parts, mine, rank):
    parts[rank] = mine
    for i, part in enumerate(parts):
        dist.broadcast(part, src=i)


def whole(t):
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def independent(rank, kind):
    """Each process initialises a flow of its own from its own data, even if the other process never does."""
    layer = nn.ActNorm(C)
    if kind == "one alone" and rank == 1:
        return
    layer(batch(rank))
    mean = batch(rank).mean(0)
    torch.testing.assert_close(layer.bias.detach(), -mean, atol=1e-4, rtol=1e-5)


def given_group(rank, kind):
    layer = nn.ActNorm(C, process_group=dist.group.WORLD)
    other = copy.deepcopy(layer)
    assert other.process_group is layer.process_group
    file = io.BytesIO()
    torch.save(layer, file)
    file.seek(0)
    assert torch.load(file, weights_only=False).process_group is None
    for each in (layer, other):
        each(batch(rank)) if kind == "forward" else each.inverse(batch(rank))
    single = nn.ActNorm(C)
    single(both()) if kind == "forward" else single.inverse(both())
    for each in (layer, other):
        torch.testing.assert_close(each.state_dict(), single.state_dict(), atol=1e-4, rtol=1e-5)


def spoilt(rank, kind):
    """Samples with NaN or inf are left out, also where one process has no others."""
    for count in (0, 4, 10):  # of the first process, which has ten of 30
        x = normal(30, C, seed=2).float() * 4 + 100
        x[:count, 0] = torch.nan
        x[25, 2] = torch.inf if count else x[25, 2]
        layer, single = nn.ActNorm(C, process_group=dist.group.WORLD), nn.ActNorm(C)
        layer(x[:10] if rank == 0 else x[10:])
        single(x)
        assert layer.initialized
        torch.testing.assert_close(layer.state_dict(), single.state_dict())


def huge(rank, kind):
    """Sums of so large numbers would overflow."""
    x = (normal(30, C, seed=2) * 1e35 + 3e37).float()
    layer, single = nn.ActNorm(C, process_group=dist.group.WORLD), nn.ActNorm(C)
    layer(x[:10] if rank == 0 else x[10:])
    single(x)
    assert (single.bias < -2e37).all()
    torch.testing.assert_close(layer.state_dict(), single.state_dict())


def one_exchange(rank, kind):
    """A layer's start is one collective, and so is each of the two passes of a normalization."""
    calls = []
    reduce = dist.all_reduce

    def counted(*args, **options):
        calls.append(args)
        return reduce(*args, **options)

    dist.all_reduce = counted
    try:
        layer = nn.ActNorm(C, process_group=dist.group.WORLD)
        for _ in range(3):
            loss_of(layer(batch(rank))).backward()
        assert len(calls) == 1
        norm = nn.BatchNorm(C, process_group=dist.group.WORLD)
        loss_of(norm(batch(rank).requires_grad_())).backward()
        assert len(calls) == 3
    finally:
        dist.all_reduce = reduce
    states = [None, None]
    dist.all_gather_object(states, {k: t.tolist() for k, t in layer.state_dict().items()})
    assert states[0] == states[1], "the same bits"


def uneven(rank, kind):
    wrapped = DistributedDataParallel(model())
    optimizer = torch.optim.SGD(wrapped.parameters(), lr=0.01)
    with Join([wrapped]):
        for i in range(1 + 3 * rank):
            optimizer.zero_grad()
            loss_of(wrapped(batch(rank) + i)).backward()
            optimizer.step()
    states = [None, None]
    dist.all_gather_object(states, wrapped.module.state_dict())
    torch.testing.assert_close(*states)


def normalizing(synchronize=True, affine=True):
    torch.manual_seed(0)
    kind = {"synchronize": synchronize, "affine": affine}
    return nn.Sequential(nn.BatchNorm(C, **kind), nn.InvertibleLinear(C), nn.BatchNorm(C, **kind))


def batch_norm(rank, kind):
    """The gradients of one process that has all samples, whose loss is the mean of those of the processes."""
    wrapped = DistributedDataParallel(normalizing(), broadcast_buffers=kind == "buffers")
    alone = normalizing()
    for step in range(2):
        for module in (wrapped, alone):
            module.zero_grad()
        loss_of(wrapped(batch(rank) + step)).backward()
        z, log_det = alone(both() + step)
        parts = [(z[:10], log_det[:10]), (z[10:], log_det[10:])]
        (sum(map(loss_of, parts)) / 2).backward()
        for a, b in zip(wrapped.module.parameters(), alone.parameters(), strict=True):
            torch.testing.assert_close(a.grad, b.grad, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(
        wrapped.module.state_dict(), alone.state_dict(), atol=1e-4, rtol=1e-5
    )
    assert torch.equal(wrapped.module.eval()(batch(0))[0], wrapped.module(batch(0))[0])


def batch_norm_sharded(rank, kind):
    """Also of layers that have nothing to shard, whose statistics are those of all processes as well."""
    flow, alone = normalizing(affine=kind == "learned"), normalizing(affine=kind == "learned")
    if kind == "left alone":
        fully_shard(flow, ignored_params={*flow[0].parameters(), *flow[2].parameters()})
    else:
        fully_shard(flow)
    for step in range(2):
        alone.zero_grad()
        flow.zero_grad()
        loss_of(flow(batch(rank) + step)).backward()
        z, log_det = alone(both() + step)
        parts = [(z[:10], log_det[:10]), (z[10:], log_det[10:])]
        (sum(map(loss_of, parts)) / 2).backward()
        for p, q in zip(flow[1].parameters(), alone[1].parameters(), strict=True):
            torch.testing.assert_close(whole(p.grad), q.grad, atol=1e-4, rtol=1e-4)
    for p, q in zip(flow.buffers(), alone.buffers(), strict=True):
        torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-5)


class Again(torch.nn.Module):
    """Computes its part again in the backward pass, as memory is saved."""

    def __init__(self, part):
        super().__init__()
        self.part = part

    def forward(self, x):
        return checkpoint(self.part, x, use_reentrant=False)


def batch_norm_again(rank, kind):
    """What is called again in the backward pass, where no wrapper's forward runs, exchanges sums as before."""
    kept, again = normalizing(), normalizing()
    for module in (kept, Again(again)):
        wrapped = DistributedDataParallel(module, broadcast_buffers=False)
        loss_of(wrapped(batch(rank))).backward()
    for p, q in zip(kept.parameters(), again.parameters(), strict=True):
        torch.testing.assert_close(q.grad, p.grad)
    other = copy.deepcopy(again).train()  # in no wrapper: one process alone may call it
    if rank == 0:
        loss_of(Again(other)(batch(0))).backward()


def batch_norm_of_input(rank, kind):
    """Gradients of the data are those of what both processes compute; one of them has none at all."""
    mine = (batch(0) if rank == 0 else batch(0)[:0]).requires_grad_()
    layer = nn.BatchNorm(C, process_group=dist.group.WORLD)
    (mine_grad,) = torch.autograd.grad(loss_sum(layer(mine)), mine)
    alone = nn.BatchNorm(C)
    x = batch(0).requires_grad_()
    (expected,) = torch.autograd.grad(loss_sum(alone(x)), x)
    torch.testing.assert_close(mine_grad, expected if rank == 0 else expected[:0])
    torch.testing.assert_close(layer.state_dict(), alone.state_dict())


def loss_sum(result):
    z, log_det = result
    return (z**3).sum() + (log_det * torch.arange(len(log_det))).sum()


def batch_norm_of_each(rank, kind):
    """Without synchronization each process has the statistics of its own batch, and may stop when it likes."""
    wrapped = DistributedDataParallel(normalizing(synchronize=False), broadcast_buffers=False)
    loss_of(wrapped(batch(rank))).backward()
    alone = normalizing()
    alone(batch(rank))
    torch.testing.assert_close(wrapped.module.state_dict(), alone.state_dict())


SCENARIOS = {
    "DDP": (ddp, "buffers"),
    "DDP without buffers": (ddp, "no buffers"),
    "DDP, two passes": (two_passes_in_ddp, ""),
    "fully_shard": (sharded, "one axis"),
    "fully_shard of each layer": (sharded, "each layer"),
    "fully_shard on two axes": (sharded, "two axes"),
    "independent flows": (independent, "both"),
    "one process alone": (independent, "one alone"),
    "a group that was given": (given_group, "forward"),
    "a group that was given, through the inverse": (given_group, "inverse"),
    "batch norm": (batch_norm, "buffers"),
    "batch norm without buffers": (batch_norm, "no buffers"),
    "batch norm, one process without data": (batch_norm_of_input, ""),
    "batch norm, computed again": (batch_norm_again, ""),
    "batch norm of each process": (batch_norm_of_each, ""),
    "batch norm, sharded": (batch_norm_sharded, "learned"),
    "batch norm, sharded, without parameters": (batch_norm_sharded, "plain"),
    "batch norm, whose parameters are not sharded": (batch_norm_sharded, "left alone"),
    "Join with uneven inputs": (uneven, ""),
    "bad samples": (spoilt, ""),
    "huge numbers": (huge, ""),
    "one exchange": (one_exchange, ""),
}


def processes():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))
    for name, (run, kind) in SCENARIOS.items():
        try:
            run(dist.get_rank(), kind)
            dist.barrier()
        except Exception as error:
            error.add_note(f"in {name}")
            raise
    dist.destroy_process_group()


def test_starts():
    """One pair of processes runs all scenarios, because starting them takes longer than running."""
    ranks.run(__file__, "processes", 2)
