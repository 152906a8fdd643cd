"""Weights as safetensors files: what comes back, what is refused, and that nothing in a file is run."""

import json
import os
import re
from pathlib import Path

import pytest
import torch

import pyflowkern
from pyflowkern import flows, nn

safetensors = pytest.importorskip("safetensors.torch")

SOLVER = {"method": "rk4", "step_size": 0.5}
MADE = {
    "MAF": {"event_shape": 3, "transforms": 2, "hidden": [8]},
    "IAF": {"event_shape": 3, "transforms": 2, "hidden": [8], "context_features": 2},
    "NSF": {"event_shape": 4, "transforms": 2, "hidden": [8], "circular": True},
    "RealNVP": {"event_shape": [3, 4, 4], "levels": 1, "steps": 1, "hidden": 4, "bits": 8},
    "Glow": {"event_shape": [1, 4, 4], "levels": 1, "steps": 1, "hidden": 4, "bits": 8},
    "CNF": {"event_shape": 2, "hidden": [8], **SOLVER},
    "FFJORD": {"event_shape": 2, "hidden": [8], **SOLVER},
    "FlowMatching": {"event_shape": 2, "hidden": [8], "classes": 3, **SOLVER},
}


def numbers(module):
    """Fill parameters with numbers that no new module has."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in module.parameters():
            p.add_(torch.rand(p.shape, generator=generator))
    return module


def same_state(a, b):
    a, b = a.state_dict(), b.state_dict()
    return a.keys() == b.keys() and all(
        a[k].dtype == b[k].dtype and torch.equal(a[k], b[k]) for k in a
    )


@pytest.mark.parametrize("name", MADE)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_flow_comes_back_from_its_file(name, dtype, tmp_path):
    flow = numbers(getattr(flows, name)(**MADE[name])).to(dtype)
    flows.save_weights(flow, tmp_path / "f.safetensors", arguments=MADE[name])
    again = flows.load_flow(tmp_path / "f.safetensors")
    assert type(again) is type(flow)
    assert same_state(flow, again)


def test_every_flow_that_a_run_can_train_is_tried():
    public = {n for n in flows.__all__ if isinstance(getattr(flows, n), type)}
    made = {n for n in public if issubclass(getattr(flows, n), flows.Flow)} - {"Flow"}
    assert made == set(MADE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_standardized_flow_comes_back(dtype, tmp_path):
    x = 100 * torch.randn(64, 3) + 1000
    flow = flows.MAF(**MADE["MAF"]).standardize(x).to(dtype)
    flows.save_weights(flow, tmp_path / "f.safetensors", arguments=MADE["MAF"])
    again = flows.load_flow(tmp_path / "f.safetensors")
    assert same_state(flow, again)
    assert torch.equal(again.log_prob(x.to(dtype)), flow.log_prob(x.to(dtype)))


def test_actnorm_that_has_started_does_not_start_again(tmp_path):
    layer, other = nn.ActNorm(3), nn.ActNorm(3)
    x = 5 * torch.randn(64, 3) + 7
    layer(x)
    flows.save_weights(layer, tmp_path / "f.safetensors")
    flows.load_weights(other, tmp_path / "f.safetensors")
    assert bool(other.initialized)
    y = torch.randn(9, 3)
    assert torch.equal(other(y)[0], layer(y)[0])


def test_a_tensor_of_two_names_is_written_once(tmp_path):
    net = torch.nn.Linear(64, 64)
    module = torch.nn.Sequential(net, net)
    flows.save_weights(module, tmp_path / "f.safetensors")
    assert (tmp_path / "f.safetensors").stat().st_size < 2 * 64 * 64 * 4
    other_net = torch.nn.Linear(64, 64)
    other = flows.load_weights(
        torch.nn.Sequential(other_net, other_net), tmp_path / "f.safetensors"
    )
    assert same_state(module, other)
    assert other[0].weight is other[1].weight


def test_other_programs_read_the_file_and_write_one(tmp_path):
    flow = numbers(flows.MAF(**MADE["MAF"]))
    flows.save_weights(flow, tmp_path / "f.safetensors")
    found = safetensors.load_file(tmp_path / "f.safetensors")
    assert all(torch.equal(t, found[name]) for name, t in flow.state_dict().items())
    safetensors.save_file(found, tmp_path / "g.safetensors")
    assert same_state(
        flows.load_weights(flows.MAF(**MADE["MAF"]), tmp_path / "g.safetensors"), flow
    )
    with pytest.raises(ValueError, match="holds no arguments"):
        flows.load_flow(tmp_path / "g.safetensors")


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "f.safetensors"
    flows.save_weights(flows.MAF(**MADE["MAF"]), path, arguments=MADE["MAF"])
    return path


def changed(file, change):
    """Write the file again with other tensors or metadata."""
    with safetensors.safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    tensors = safetensors.load_file(file)
    name = next(iter(tensors))
    change(tensors, metadata, name)
    safetensors.save_file(tensors, file, metadata)
    return name


NOT_FITTING = {
    "lacks": (ValueError, lambda t, m, n: t.pop(n), "lacks {}$"),
    "more": (ValueError, lambda t, m, n: t.update(odd=t[n].clone()), "has not: odd$"),
    "shape": (
        ValueError,
        lambda t, m, n: t.update({n: torch.zeros(2, 9)}),
        r"{} must have shape \[.*\], got \[2, 9\]",
    ),
    "dtype": (
        TypeError,
        lambda t, m, n: t.update({n: t[n].double()}),
        "{} must be torch.float32, got torch.float64",
    ),
}


@pytest.mark.parametrize("kind", NOT_FITTING)
def test_what_does_not_fit_is_named_and_nothing_is_loaded(kind, file):
    error, change, message = NOT_FITTING[kind]
    name = changed(file, change)
    flow = numbers(flows.MAF(**MADE["MAF"]))
    before = {k: t.clone() for k, t in flow.state_dict().items()}
    for load in (lambda: flows.load_weights(flow, file), lambda: flows.load_flow(file)):
        with pytest.raises(error, match=message.format(re.escape(name))) as caught:
            load()
        assert str(caught.value).startswith(f"{file}: ")
    assert all(torch.equal(t, before[k]) for k, t in flow.state_dict().items())


HOSTILE = {
    "unknown flow": lambda t, m, n: m.update(flow="Nothing"),
    "a function": lambda t, m, n: m.update(flow="load_flow"),
    "a base class": lambda t, m, n: m.update(flow="Flow"),
    "another module": lambda t, m, n: m.update(flow="os.system"),
    "no JSON": lambda t, m, n: m.update(arguments="{"),
    "a list": lambda t, m, n: m.update(arguments="[1]"),
    "another argument": lambda t, m, n: m.update(arguments='{"event_shape": 3, "odd": 1}'),
    "no dtype": lambda t, m, n: m.pop("dtype"),
    "a dtype that is none": lambda t, m, n: m.update(dtype="nn"),
    "a dtype without a fraction": lambda t, m, n: m.update(dtype="int64"),
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_metadata_are_one_error(kind, file):
    changed(file, HOSTILE[kind])
    with pytest.raises(ValueError, match="its flow cannot be made"):
        flows.load_flow(file)


@pytest.mark.parametrize("text", ["[", "[1]", '{"a": "b"}', '{"a": 1}'])
def test_hostile_names_of_shared_tensors_are_one_error(text, file):
    changed(file, lambda t, m, n: m.update(shared=text))
    with pytest.raises(ValueError, match="not a safetensors file, or a damaged one"):
        flows.load_flow(file)


def test_damaged_files_are_one_error(file):
    data = file.read_bytes()
    for part in (b"", b"text", data[:7], data[:-1], data[: len(data) // 2], data + b"x"):
        file.write_bytes(part)
        with pytest.raises(ValueError, match="not a safetensors file"):
            flows.load_flow(file)
    file.unlink()
    with pytest.raises(FileNotFoundError, match="no such file"):
        flows.load_flow(file)
    os.mkfifo(file)
    with pytest.raises(ValueError, match="not a regular file"):
        flows.load_flow(file)


def test_wrong_arguments_of_saving(tmp_path):
    flow, path = flows.MAF(**MADE["MAF"]), tmp_path / "f.safetensors"
    for error, given, message in (
        (ValueError, MADE["MAF"] | {"hidden": [9]}, "make another"),
        (ValueError, MADE["MAF"] | {"odd": 1}, "make no MAF"),
        (TypeError, MADE["MAF"] | {"base": flows.StandardNormal(3)}, "must be numbers, text"),
    ):
        with pytest.raises(error, match=message):
            flows.save_weights(flow, path, arguments=given)
    with pytest.raises(TypeError, match="which is no flow"):
        flows.save_weights(nn.ActNorm(3), path, arguments={"channels": 3})
    for call in (flows.save_weights, flows.load_weights):
        with pytest.raises(TypeError, match=r"module must be a torch\.nn\.Module, got int"):
            call(3, path)
    assert not path.exists()


def test_a_full_disk_leaves_the_old_file(file, monkeypatch):
    before = file.read_bytes()

    def full(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        flows.save_weights(flows.MAF(**MADE["MAF"]), file)
    assert caught.value.filename == str(file)
    assert [path.name for path in file.parent.iterdir()] == [file.name]
    assert file.read_bytes() == before


def test_nothing_of_the_package_reads_pickles():
    """Checkpoints are read as plain tensors and numbers; arrays without objects in them."""
    root = Path(pyflowkern.__file__).parent
    seen = 0
    for path in root.rglob("*.py"):
        text = path.read_text()
        for call in re.findall(r"\btorch\.load\((?:[^()]|\([^()]*\))*\)", text):
            seen += 1
            assert "weights_only=True" in call, f"{path}: {call}"
        for call in re.findall(r"\bnp\.load\((?:[^()]|\([^()]*\))*\)", text):
            seen += 1
            assert "allow_pickle=False" in call, f"{path}: {call}"
        for word in (
            r"\bpickle\.loads?\b",
            r"\bUnpickler\b",
            "weights_only=False",
            "yaml.load\\(",
        ):
            assert not re.search(word, text), f"{path}: {word}"
        assert not re.search(
            r"^\s*(import|from) (pickle|dill|joblib|cloudpickle|marshal|shelve)\b", text, re.M
        )
    assert seen >= 2, "the test no longer finds the calls"


def test_arguments_stand_as_text_in_the_file(file):
    size = int.from_bytes(file.read_bytes()[:8], "little")
    header = json.loads(file.read_bytes()[8 : 8 + size])
    assert json.loads(header["__metadata__"]["arguments"]) == MADE["MAF"]
