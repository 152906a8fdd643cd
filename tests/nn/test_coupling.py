"""Couplings and splits: masks, conditioners of the user, contexts, bad arguments."""

import copy
from functools import partial

import pytest
import torch
from laws import normal, randomize

from pyflowkern import nn
from pyflowkern.ops import ScaleMap

MLP = partial(nn.MLP, hidden=8)
CONV = partial(nn.ConvNet, hidden=8)


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize("channels", [2, 5])
def test_one_half_of_the_channels_is_unchanged(channels, swap):
    layer = randomize(nn.AffineCoupling(channels, MLP, swap=swap))
    x = normal(4, channels, dtype=torch.float32)
    changed = (layer(x)[0] != x).all(0)
    assert torch.equal(changed, nn.channel_mask(channels) ^ swap)


@pytest.mark.parametrize("swap", [False, True])
def test_a_checkerboard_leaves_every_second_pixel_unchanged(swap):
    layer = randomize(nn.AffineCoupling(2, CONV, split="checkerboard", swap=swap))
    x = normal(3, 2, 4, 5, dtype=torch.float32)
    changed = (layer(x)[0] != x).all(0)
    rows, columns = torch.meshgrid(torch.arange(4), torch.arange(5), indexing="ij")
    assert torch.equal(changed, (((rows + columns) % 2 == 1) ^ swap).expand(2, 4, 5))


@pytest.mark.parametrize("split", ["checkerboard", "mask"])
def test_the_network_never_sees_transformed_elements(split):
    """NaN in a transformed element reaches neither the parameters nor any other element."""
    mask = nn.checkerboard_mask((1, 4, 4))
    layer = nn.AffineCoupling(1, CONV, split=mask if split == "mask" else split)
    x = normal(2, 1, 4, 4, dtype=torch.float32)
    x[mask.expand_as(x)] = torch.nan
    z, _ = randomize(layer)(x)
    assert torch.equal(z.isnan(), x.isnan())


def test_a_new_coupling_is_the_identity():
    x = normal(3, 4, dtype=torch.float32)
    for layer in (nn.AffineCoupling(4, MLP), nn.AdditiveCoupling(4, MLP), nn.Split(4, MLP)):
        z, log_det = layer(x)
        torch.testing.assert_close(z, x)
        assert torch.equal(log_det, torch.zeros(3))


def test_any_module_serves_as_a_conditioner():
    net = torch.nn.Sequential(torch.nn.Linear(2, 8), torch.nn.Tanh(), torch.nn.Linear(8, 4))
    layer = nn.AffineCoupling(4, net)
    assert layer.conditioner is net
    x = normal(3, 4, dtype=torch.float32)
    torch.testing.assert_close(layer.inverse(layer(x)[0])[0], x)


def test_a_factory_is_told_the_sizes():
    seen = []

    def factory(inputs, outputs):
        seen.append((inputs, outputs))
        return torch.nn.Linear(inputs, outputs)

    nn.AffineCoupling(5, factory)
    nn.AffineCoupling(5, factory, swap=True)
    nn.AffineCoupling(5, factory, split=nn.channel_mask(5))
    nn.AdditiveCoupling(5, factory)
    nn.Split(5, factory)
    assert seen == [(3, 4), (2, 6), (5, 10), (3, 2), (3, 4)]


def test_context_moves_the_output_of_its_own_sample_only():
    layer = randomize(nn.AffineCoupling(4, partial(nn.MLP, hidden=8, context_features=2)))
    x, context = normal(3, 4, dtype=torch.float32), normal(3, 2, dtype=torch.float32)
    other = context.clone()
    other[1] += 1
    same = (layer(x, context)[0] == layer(x, other)[0]).all(1)
    assert same.tolist() == [True, False, True]


def test_split_standardises_by_a_prior_given_the_kept_half():
    split = randomize(nn.Split(4, CONV, scale_map="exp"))
    x = normal(2, 4, 3, 3, dtype=torch.float32)
    z, log_det = split(x)
    kept, latent = split.partition(z)
    mean, log_std = split.prior(x[:, :2]).chunk(2, 1)
    assert torch.equal(kept, x[:, :2])
    torch.testing.assert_close(latent, (x[:, 2:] - mean) / log_std.exp())
    torch.testing.assert_close(log_det, -log_std.sum((1, 2, 3)))
    assert torch.equal(split.join(kept, latent), z)


@pytest.mark.parametrize(
    ("build", "error", "message"),
    [
        (lambda: nn.AffineCoupling(0, MLP), ValueError, "channels must be at least 1, got 0"),
        (lambda: nn.Split(1), ValueError, "channels must be at least 2 .* got 1"),
        (
            lambda: nn.AffineCoupling(4, MLP, split="rows"),
            ValueError,
            "split must be .* got 'rows'",
        ),
        (
            lambda: nn.AffineCoupling(4, MLP, split=nn.channel_mask(3)),
            ValueError,
            r"split must be a mask \[4\] .* got shape \(3,\)",
        ),
        (
            lambda: nn.AffineCoupling(4, MLP, split=torch.ones(4)),
            TypeError,
            "split must be a boolean mask, got torch.float32",
        ),
        (lambda: nn.AffineCoupling(4, MLP, scale_map="cube"), ValueError, "scale_map .* 'cube'"),
        (lambda: nn.AffineCoupling(4, 7), TypeError, "conditioner must be .* got int"),
        (
            lambda: nn.AffineCoupling(4, lambda i, o: i),
            TypeError,
            "factory must return .* got int",
        ),
    ],
)
def test_bad_arguments_are_named(build, error, message):
    with pytest.raises(error, match=message):
        build()


def test_a_conditioner_of_the_wrong_size_is_named():
    layer = nn.AffineCoupling(4, torch.nn.Linear(2, 3))
    with pytest.raises(ValueError, match=r"params must have shape \(5, 4\).* got \(5, 3\)"):
        layer(torch.zeros(5, 4))


SPLITS = {
    "channels": lambda: nn.channel_mask(5, interleaved=True),
    "no slice": lambda: torch.tensor([True, True, False, True, False], device="cpu"),
    "space": lambda: nn.checkerboard_mask((1, 4, 4)),
}


@pytest.mark.parametrize("build", [nn.AffineCoupling, nn.SplineCoupling])
@pytest.mark.parametrize("split", SPLITS)
def test_masks_survive_changes_of_a_layers_memory(build, split):
    factory = CONV if split == "space" else MLP
    channels = 1 if split == "space" else 5
    layer = build(channels, factory, split=SPLITS[split](), swap=True)
    kept = [b.clone() for b in layer.buffers()]
    with torch.device("meta"):
        other = build(channels, factory, split=SPLITS[split](), swap=True)
        assert all(b.is_meta for b in other.buffers())
        copied = copy.deepcopy(other)
    changes = [
        lambda m: m.to_empty(device="cpu"),
        lambda m: m.double(),
        lambda m: m.type(torch.float64),
        lambda m: m.share_memory(),
        lambda m: m.to("meta").to_empty(device="cpu"),
    ]
    for start in (other, copied, layer):
        for change in changes:
            change(start)
            assert all(map(torch.equal, start.buffers(), kept)), change
    assert not [name for name in layer.state_dict() if "mask" in name or "passing" in name]


def test_a_mask_without_values_is_refused():
    with pytest.raises(ValueError, match=r"split must be a mask with values, .* meta"):
        nn.AffineCoupling(4, MLP, split=torch.ones(4, dtype=torch.bool, device="meta"))


# --- volume-preserving couplings ---


@pytest.mark.parametrize("shape", [(6,), (6, 3, 2)])
def test_gin_is_what_its_authors_compute(backend, shape):
    """As Sorrenson et al. (2020): bounded log-scales less their mean over the transformed channels."""
    network = partial(nn.ConvNet, hidden=4) if len(shape) > 1 else MLP
    clamped = ScaleMap("atan", clamp=1.9, gain=1.9)
    layer = randomize(nn.GINCoupling(6, network, scale_map=clamped)).double().to(backend)
    x = normal(5, *shape).to(backend)
    shift, raw = layer.conditioner(x[:, :3]).chunk(2, 1)
    log_scale = 1.9 * 0.636 * torch.atan(raw)
    log_scale = log_scale - log_scale.mean(1, keepdim=True)
    z, log_det = layer(x)
    expected = torch.cat([x[:, :3], log_scale.exp() * x[:, 3:] + shift], 1)
    torch.testing.assert_close(z, expected)
    assert not log_det.any()
    assert not torch.allclose(z[:, 3:] - x[:, 3:], shift)


def test_gin_takes_splits_of_channels():
    for split in ("checkerboard", torch.ones(6, 2, dtype=torch.bool)):
        with pytest.raises(ValueError, match="split must be 'channel' or a boolean mask"):
            nn.GINCoupling(6, MLP, split=split)
    with pytest.raises(ValueError, match="scale_map must have a scale"):
        nn.GINCoupling(6, MLP, scale_map="additive")
    x = normal(4, 2)  # a single transformed channel
    layer = randomize(nn.GINCoupling(2, MLP)).double()
    torch.testing.assert_close(layer(x)[0][:, 1] - x[:, 1], layer.conditioner(x[:, :1])[:, 0])
