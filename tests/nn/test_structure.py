"""Averages of models, casts and old files leave masks and permutations as they are."""

import copy
from functools import partial

import pytest
import torch
from laws import normal, randomize
from torch.optim.swa_utils import AveragedModel, get_ema_avg_fn, get_ema_multi_avg_fn

from pyflowkern import flows, nn
from pyflowkern.ops import MaskedLayer, MaskedPlan

MODELS = {
    "plu": lambda: nn.InvertibleLinear(9),
    "permutation": lambda: nn.Permutation(9),
    "reverse": lambda: nn.Reverse(9),
    "actnorm": lambda: nn.ActNorm(9),
    "mask": lambda: nn.SplineCoupling(
        9, partial(nn.MLP, hidden=4), split=torch.arange(9) * 7 % 9 > 4
    ),
    "NSF": lambda: flows.NSF(9, transforms=2, hidden=(8, 8)),
    "NSF with permutations": lambda: flows.NSF(
        9, transforms=2, hidden=(8, 8), mixing="permutation"
    ),
    "MAF": lambda: flows.MAF(9, transforms=2, hidden=(8, 8), order="random"),
}
AVERAGES = {
    "SWA": {},
    "EMA": {"multi_avg_fn": get_ema_multi_avg_fn(0.9)},
    "EMA one by one": {"avg_fn": get_ema_avg_fn(0.9)},
}


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("average", AVERAGES)
def test_averages_of_buffers(model, average):
    module = randomize(MODELS[model]()).eval()
    x = normal(5, 9, dtype=torch.float32)
    averaged = AveragedModel(module, use_buffers=True, **AVERAGES[average])
    for _ in range(40):
        averaged.update_parameters(module)
    # averages of equal numbers differ by some roundings
    torch.testing.assert_close(averaged(x), module(x), atol=1e-4, rtol=1e-4)


def test_permutations_survive_half_types_and_old_files():
    layer = nn.Permutation(torch.arange(5000).flip(0))
    x = torch.arange(5000.0)[None]
    for dtype in (torch.bfloat16, torch.float16, torch.float64):
        other = copy.deepcopy(layer).to(dtype)
        assert torch.equal(other(x)[0], x.flip(1))
        assert torch.equal(other.inverse(x)[0], x.flip(1))
    old = {k: v.long() for k, v in layer.state_dict().items()}
    for assign in (False, True):
        other = nn.Permutation(5000)
        other.load_state_dict(old, assign=assign)
        assert torch.equal(other(x)[0], x.flip(1))
        assert other.permutation.dtype == torch.float32
    matrix = nn.InvertibleLinear(5)
    state = {k: v.long() if k == "permutation" else v for k, v in matrix.state_dict().items()}
    other = nn.InvertibleLinear(5)
    other.load_state_dict(state)
    assert torch.equal(other.matrix()[0], matrix.matrix()[0])


def test_layers_copy_the_masks_of_the_caller():
    order, mask = torch.tensor([2, 0, 1]), torch.ones(3, 3).tril(-1).bool()
    split = torch.tensor([False, True, True])
    layer, plan = nn.Permutation(order), MaskedPlan([MaskedLayer(mask)], features=3)
    coupling = nn.AffineCoupling(3, nn.MLP, split=split)
    order.zero_(), mask.fill_(True), split.fill_(True)
    assert layer(torch.arange(3.0)[None])[0].tolist() == [[2, 0, 1]]
    assert plan.layers[0].mask.sum() == 3
    assert coupling.mask.tolist() == [False, True, True]


def test_masks_follow_the_device_of_the_data():
    """Also without a call of ``.to``, as under ``fully_shard``."""
    layer = nn.AffineCoupling(4, nn.MLP, split=nn.channel_mask(4)).to("meta")
    assert layer(torch.zeros(2, 4, device="meta"))[0].is_meta
    layer = layer.to_empty(device="cpu")
    assert layer.mask.tolist() == nn.channel_mask(4).tolist()
    assert not list(layer.buffers())
