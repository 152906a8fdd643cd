"""Training of learned bridges, their states, and wrong arguments."""

import math

import pytest
import torch

from pyflowkern import nn, transport
from pyflowkern.transport._bridge_steps import mean_matching

METHODS = ("sf2m", "dsbm_imf", "dsbm_ipf", "dsb")


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def small(method, **options):
    torch.manual_seed(0)
    given = {"hidden": (16,), "steps": 5, "iteration_calls": 4, "refresh_every": 2, "pool": 50}
    return transport.SchrodingerBridge(2, method=method, **(given | options))


def clouds(n=32, count=2):
    return [torch.randn(n, 2, generator=generator(s)) + s for s in range(count)]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("times", [(0.0, 1.0), (0.0, 0.5, 2.0)])
def test_every_method_trains(method, times):
    bridge = small(method, times=times)
    optimizer = torch.optim.Adam(bridge.parameters(), 1e-2)
    seen = set()
    for step in range(13):
        optimizer.zero_grad()
        loss = bridge.loss(clouds(count=len(times)), generator=generator(step))
        loss.backward()
        gradients = {n: p.grad for n, p in bridge.named_parameters() if p.grad is not None}
        assert bool(loss.isfinite())
        assert gradients
        assert all(bool(g.isfinite().all()) for g in gradients.values())
        trained = {n.split(".")[1] for n in gradients}
        assert trained == ({"0", "1"} if method == "sf2m" else {"01"[bridge.iteration % 2 == 0]})
        seen.add(bridge.iteration)
        optimizer.step()
    assert seen == ({0} if method == "sf2m" else {0, 1, 2, 3})
    path = bridge.sample(clouds()[0], 7, generator=generator(1))
    assert path.shape == (8, 32, 2)
    assert bool(path.isfinite().all())


@pytest.mark.parametrize("method", METHODS)
def test_a_bridge_goes_on_from_its_state(method):
    def run(bridge, steps):
        optimizer = torch.optim.SGD(bridge.parameters(), 1e-2)
        for step in steps:
            optimizer.zero_grad()
            loss = bridge.loss(*clouds(), generator=generator(step))
            loss.backward()
            optimizer.step()
        return loss

    whole, half, other = small(method), small(method), small(method, activation="silu")
    wanted = run(whole, range(10))
    run(half, range(7))
    other.load_state_dict(half.state_dict())
    assert torch.equal(run(other, range(7, 10)), wanted)


@pytest.mark.parametrize("method", ["dsbm_imf", "dsb"])
def test_an_iteration_begins_with_paths_of_its_own(method):
    bridge, written = small(method, pool=500), []
    for step in range(9):
        bridge.loss(*clouds(), generator=generator(step))
        written.append((bridge.iteration, int(bridge.progress[2])))
    each = 32 * 5 if method == "dsb" else 32  # rows of a simulation, every second call
    first = [each, each, 2 * each, 2 * each]
    begin = [0] * 4 if method == "dsbm_imf" else first
    wanted = [*of_iteration(0, begin), *of_iteration(1, first), (2, each)]
    assert written == wanted


def of_iteration(iteration, counts):
    return [(iteration, n) for n in counts]


def test_proportional_fitting_begins_with_brownian_motion():
    x = torch.randn(20_000, 2, generator=generator())
    bridge = small("dsbm_ipf", sigma=0.5, times=(1.0, 4.0))
    x0, x1 = bridge._first(0, [x, x], generator(1))
    assert torch.equal(x0, x)
    torch.testing.assert_close((x1 - x0).T.cov(), 0.75 * torch.eye(2), atol=0.03, rtol=0)


@pytest.mark.parametrize("times", [[0.0, 0.5, 2.0], [2.0, 0.5, 0.0]])
def test_mean_matching_for_given_draws(times):
    """The drift of a step's beginning at its end, and the noise of the step, with the sign of its direction."""
    sigma, x = 0.7, torch.randn(4, 2, generator=generator(), dtype=torch.float64)
    at, points, targets = mean_matching(lambda t, x: (t + 1) * x, x, times, sigma, torch.tensor(1))
    for k, after in enumerate(times[1:]):
        dt, part = after - times[k], slice(4 * k, 4 * k + 4)
        noise = points[part] - x - dt * (times[k] + 1) * x
        x = points[part]
        assert (at[part] == after).all()
        torch.testing.assert_close(targets[part], (times[k] + 1) * x + noise / dt)


@pytest.mark.parametrize("method", METHODS)
def test_in_eval_mode_a_loss_changes_nothing(method):
    bridge = small(method)
    for step in range(6):
        bridge.loss(*clouds(), generator=generator(step))
    before = {k: v.clone() for k, v in bridge.state_dict().items()}
    first, second = (bridge.eval().loss(*clouds(), generator=generator(9)) for _ in range(2))
    assert torch.equal(first, second)
    assert all(torch.equal(v, before[k]) for k, v in bridge.state_dict().items())


@pytest.mark.parametrize("plan", ["sinkhorn", "exact", "unbalanced", "independent", "given"])
def test_every_plan_gives_pairs(plan):
    x0 = torch.tensor([[0.0, 0.0], [5.0, 0.0]])
    bridge = small("sf2m", plan=plan, sigma=0.3)
    pairs = bridge._first(0, [x0, x0 + 1], generator())
    assert all(t.shape == (2, 2) for t in pairs)
    if plan in ("sinkhorn", "exact", "unbalanced", "given"):  # the far ends are e^-100 apart
        assert torch.equal(pairs[1] - pairs[0], torch.ones(2, 2))


def test_an_unbalanced_plan_draws_what_has_no_partner_rarely():
    """A point far from all others loses its mass rather than being carried there."""
    x0 = torch.cat([torch.zeros(50, 2), torch.full((50, 2), 20.0)])
    bridge = small("sf2m", plan="unbalanced", sigma=0.5)
    start, _ = bridge._first(0, [x0, torch.zeros(100, 2)], generator())
    assert float((start[:, 0] > 10).float().mean()) < 0.02


def test_growth_is_that_of_the_unbalanced_plan():
    """Of two groups far apart, halves of the samples, one grows to three quarters and the other shrinks."""
    zero, far = torch.zeros(20, 2), torch.full((20, 2), 20.0)
    x0 = torch.cat([zero, far])
    x1 = torch.cat([zero, zero[:10], far[:10]])  # 3/4 and 1/4
    bridge = small("sf2m", plan="unbalanced", sigma=0.5, reg_m=1.0, times=(0.0, 1.0, 3.0))
    growth = bridge.growth(x0, x1)
    assert growth.shape == (40,)
    # min over s of rho KL(s | 1/2) + rho KL(s | 3/4) + epsilon KL(s | 3/8) for a group: s by its derivative
    for interval, group, reached in ((0, slice(0, 20), 0.75), (0, slice(20, 40), 0.25)):
        epsilon = 2 * 0.5**2
        log_s = (math.log(0.5) + math.log(reached) + epsilon * math.log(0.5 * reached)) / (
            2 + epsilon
        )
        wanted = math.exp(log_s) / 0.5
        found = bridge.growth(x0, x1, interval)[group]
        torch.testing.assert_close(found, torch.full_like(found, wanted), rtol=0.02, atol=0)
    assert not torch.allclose(bridge.growth(x0, x1, 1), growth, rtol=0.01)  # of a longer time
    pairs = bridge._first(0, [x0, x1], generator())
    share = float((pairs[0][:, 0] > 10).float().mean())
    assert 0.1 < share < 0.6  # of 40 draws
    for call, match in (
        (lambda: small("sf2m").growth(x0, x1), "plan must be 'unbalanced'"),
        (lambda: bridge.growth(x0, x1, 2), "interval must be at most 1"),
        (lambda: bridge.growth(x0, x1[:, :1]), "x1 must have shape"),
    ):
        with pytest.raises(ValueError, match=match):
            call()


def test_paths_are_those_of_the_seed_for_every_number_of_threads():
    """And a path is that of its place: other paths beside it change nothing."""
    bridge, x = small("sf2m"), torch.randn(3000, 2, generator=generator())
    before, runs = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            runs.append(bridge.sample(x, 4, heun=True, generator=generator(5)))
    finally:
        torch.set_num_threads(before)
    for run in runs[1:]:
        torch.testing.assert_close(run, runs[0], rtol=1e-5, atol=1e-5)
    few = bridge.sample(x[:7], 4, heun=True, generator=generator(5))
    torch.testing.assert_close(few, runs[0][:, :7], rtol=1e-5, atol=1e-5)
    other = bridge.sample(x[:7], 4, heun=True, generator=generator(6))
    assert not torch.allclose(few, other, atol=0.1)


def test_images_and_networks_of_the_users():
    image = transport.SchrodingerBridge((1, 4, 4), hidden=(4,))
    x = torch.randn(3, 1, 4, 4)
    image.loss(x, x.flip(0)).backward()
    assert image.sample(x, 2).shape == (3, 3, 1, 4, 4)
    made = []

    def network(size):
        made.append(nn.VectorFieldMLP(size, (4,), time="concat"))
        return made[-1]

    bridge = transport.SchrodingerBridge(2, network=network)
    assert list(bridge.networks) == made


def test_float64():
    bridge = small("dsbm_imf").double()
    for step in range(5):
        assert (
            bridge.loss(*(c.double() for c in clouds()), generator=generator(step)).dtype
            == torch.float64
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sigma": 0.0}, "sigma must be positive"),
        ({"method": "ipf"}, "method must be one of sf2m"),
        ({"steps": 0}, "steps must be at least 1"),
        ({"times": (0.0,)}, "times must be two or more"),
        ({"times": (0.0, 0.0)}, "times must be two or more"),
        ({"plan": "best"}, "plan must be one of"),
        ({"method": "dsb", "plan": "exact"}, "plan must be None for 'dsb'"),
        ({"reg_m": -1.0}, "reg_m must be positive"),
        ({"iteration_calls": 0}, "iteration_calls must be at least 1"),
        ({"refresh_every": 0}, "refresh_every must be at least 1"),
        ({"pool": 0}, "pool must be at least 1"),
        ({"activation": "relu"}, "activation must be one of"),
        ({"activation": "relu", "network": torch.nn.Linear}, "activation must be one of"),
        ({"time": "bogus"}, "time must be one of none, concat, concatsquash, got .bogus."),
        ({"time": "bogus", "network": torch.nn.Linear}, "time must be one of"),
    ],
)
def test_wrong_arguments_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        transport.SchrodingerBridge(2, **options)


def test_wrong_samples_are_named():
    bridge, (x0, x1) = small("dsbm_imf"), clouds()
    normal = torch.distributions.Normal(0.0, 1.0)  # a density for each number, not for each sample
    for call, kind, message in (
        (lambda: bridge.loss(x0), ValueError, "x1 must be given"),
        (lambda: bridge.loss([x0, x1], x1), ValueError, "x1 must be None"),
        (lambda: bridge.loss([x0, x1, x1]), ValueError, "each of the 2 times, got 3"),
        (lambda: bridge.loss(x0[:0], x1), ValueError, "x0 must have a sample"),
        (lambda: bridge.loss(x0, x1[:, :1]), ValueError, "x1 must have shape .N, 2."),
        (lambda: bridge.loss(x0, x1.double()), TypeError, "x1 must have the bridge's dtype"),
        (lambda: bridge.loss(x0, x1, generator=3), TypeError, "generator must be"),
        (lambda: bridge.sample(x0, 0), ValueError, "steps must be at least 1"),
        (lambda: bridge.sample(x0, backward=1), TypeError, "backward must be True or False"),
        (lambda: bridge.sample(x0, start=1.5), ValueError, "start must be between 0.0 and 1.0"),
        (lambda: bridge.sample(x0, end=math.nan), ValueError, "end must be between 0.0 and 1.0"),
        (lambda: bridge.sample(x0, end="1"), TypeError, "end must be a number"),
        (lambda: bridge.sample(x0, start=0.5, end=0.5), ValueError, "must differ, both are 0.5"),
        (lambda: bridge.sample(x0, start=0.7, end=0.2), ValueError, "start must be before end"),
        (lambda: bridge.sample(x0, end=0), ValueError, "start and end must differ"),
        (
            lambda: bridge.flow_map(x0, start=0.2, end=0.7, backward=True),
            ValueError,
            "start must be after end",
        ),
        (lambda: bridge.flow_map(x0, end=2), ValueError, "end must be between"),
        (lambda: bridge.log_prob(x0, torch.sum, start=-1), ValueError, "start must be between"),
        (lambda: bridge.log_prob(x0, torch.sum, end=0.0), ValueError, "must differ"),
        (lambda: bridge.drift(torch.zeros(3), x0), ValueError, "t must be"),
        (lambda: bridge.log_prob(x0, 3.0), TypeError, "base must be"),
        (lambda: bridge.log_prob(x0[:2], normal), ValueError, r"shape \(2,\), got \(2, 2\)"),
        (lambda: bridge.log_prob(x0, torch.sum), ValueError, "base must return a log-density"),
        (lambda: bridge.log_prob(x0, torch.sum, divergence="no"), ValueError, "divergence must"),
        (lambda: small("sf2m").next_iteration(), ValueError, "has no iterations"),
        (lambda: transport.SchrodingerBridge((2, 2)), ValueError, "event_shape must be D or"),
        (lambda: transport.SchrodingerBridge(0), ValueError, "event_shape must be"),
        (lambda: transport.SchrodingerBridge(2, network=3), TypeError, "network must make"),
        (lambda: small("sf2m", plan="given").loss(x0, x1[:3]), ValueError, "as many samples"),
    ):
        with pytest.raises(kind, match=message):
            call()


@pytest.mark.parametrize("method", ["sf2m", "dsbm_imf", "dsb"])
def test_snapshots_of_unequal_counts_are_one_call_of_each_network(method):
    """The loss is the mean over intervals, of each of which it is the mean over its own samples."""
    bridge = small(method, times=(0.0, 1.0, 3.0), steps=4).double()
    for parameter in bridge.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    generator = torch.Generator().manual_seed(2)
    clouds = [torch.randn(n, 2, dtype=torch.float64) for n in (5, 9, 3)]
    terms = bridge.eval()._regressions(clouds, generator)
    names = ("velocity", "score") if method == "sf2m" else ("forward", "backward")
    alone = [t.loss(bridge.networks[names.index(t.network)](t.t, t.x)) for t in terms]
    calls = [[], []]
    for network, seen in zip(bridge.networks, calls, strict=True):
        network.register_forward_hook(lambda module, args, out, seen=seen: seen.append(len(out)))
    loss = bridge.loss(clouds, generator=generator.manual_seed(2))
    torch.testing.assert_close(loss, sum(alone) / 2)
    rows = sum(len(t.t) for t in terms if t.network == terms[0].network)
    assert calls == ([[rows], [rows]] if method == "sf2m" else [[], [rows]])
