"""Files are complete or absent: after kills, on full disks, with links in their place."""

import os
import re
import time

import fresh
import numpy as np
import pytest

from pyflowkern.core import files
from pyflowkern.core.files import write_atomic
from pyflowkern.train import TrainConfig, train

TINY = {"data": "t.csv", "flow": "RealNVP", "flow_args": {"steps": 1, "hidden": 4}, "every": 2}


def test_a_file_is_replaced_and_nothing_else_stays(tmp_path):
    path = tmp_path / "deeper" / "x.csv"
    for text in (b"first", memoryview(b"second")):
        write_atomic(path, text)
    assert path.read_bytes() == b"second"
    assert [p.name for p in path.parent.iterdir()] == ["x.csv"]
    assert path.stat().st_mode & 0o777 == 0o666 & ~_umask(), "not the mode of an ordinary new file"


def _umask():
    mask = os.umask(0)
    os.umask(mask)
    return mask


#: Write over last.ckpt and wait while the file is half written.
SLOW_WRITER = """
import os, sys, time; from pathlib import Path
from pyflowkern.core import files
def wait(handle):
    print("writing", flush=True); time.sleep(60)
os.fsync = wait
files.write_atomic(Path(sys.argv[1]), b"new")
"""


@pytest.fixture
def writer(tmp_path):
    """Start a process that waits while it overwrites last.ckpt."""
    path = tmp_path / "last.ckpt"
    path.write_text("old")
    with fresh.Process(SLOW_WRITER, path) as process:
        assert process.stdout.readline() == "writing\n"
        yield process
        process.kill()


def test_a_kill_while_writing_leaves_the_old_file_and_the_next_write_cleans_up(writer, tmp_path):
    path = tmp_path / "last.ckpt"
    writer.kill()
    writer.wait()
    assert path.read_text() == "old"
    assert len(list(tmp_path.iterdir())) == 2, "no half-written file: this tests nothing"
    write_atomic(tmp_path / "other.csv", b"1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["last.ckpt", "other.csv"]


def test_the_file_of_a_living_writer_is_left_alone(writer, tmp_path):
    before = set(tmp_path.iterdir())
    write_atomic(tmp_path / "other.csv", b"1")
    assert before < set(tmp_path.iterdir())


def test_the_file_of_another_machine_is_left_alone_for_a_day(tmp_path):
    """Its lock may not be seen from here."""
    of_another = tmp_path / f".pyflowkern-{'0' * 16}.tmp"
    of_another.touch()
    for hours, there in ((0, True), (23, True), (25, False)):
        os.utime(of_another, times=(time.time() - 3600 * hours,) * 2)
        write_atomic(tmp_path / "x.csv", b"1")
        assert of_another.exists() == there
    ours = tmp_path / f".pyflowkern-{files._HOST}{'0' * 8}.tmp"
    ours.touch()
    write_atomic(tmp_path / "x.csv", b"1")
    assert not ours.exists()


def test_links_and_pipes_that_look_like_temporary_files_are_neither_followed_nor_opened(tmp_path):
    (tmp_path / "secret").write_text("secret")
    (tmp_path / f".pyflowkern-{files._HOST}0.tmp").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / f".pyflowkern-{files._HOST}1.tmp")
    # the name that earlier versions took
    (tmp_path / f".x.{os.getpid()}.csv").symlink_to(tmp_path / "secret")
    write_atomic(tmp_path / "x.csv", b"1")
    assert (tmp_path / "secret").read_text() == "secret"
    assert (tmp_path / "x.csv").read_bytes() == b"1"
    assert not (tmp_path / "x.csv").is_symlink()


def test_temporary_names_are_unpredictable(tmp_path, monkeypatch):
    names = []
    replace = os.replace

    def spy(source, target):
        names.append(os.path.basename(source))
        replace(source, target)

    monkeypatch.setattr(os, "replace", spy)
    for _ in range(20):
        write_atomic(tmp_path / "x.csv", b"1")
    assert len(set(names)) == 20
    assert all(re.fullmatch(r"\.pyflowkern-[0-9a-f]{16}\.tmp", name) for name in names)


def test_a_link_in_place_of_the_file_is_replaced(tmp_path):
    (tmp_path / "other").write_text("other")
    (tmp_path / "x.csv").symlink_to(tmp_path / "other")
    write_atomic(tmp_path / "x.csv", b"1")
    assert (tmp_path / "other").read_text() == "other"


def test_a_write_that_fails_names_the_file_and_leaves_nothing(tmp_path, monkeypatch):
    def full(handle):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=r"No space left on device.*x\.csv") as caught:
        write_atomic(tmp_path / "x.csv", b"1" * 10)
    assert caught.value.filename == str(tmp_path / "x.csv")
    assert not list(tmp_path.iterdir())


#: Run a command where no file may grow beyond a number of bytes: a full disk without a disk.
LIMITED = """
import resource, signal, sys
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
sys.argv = ["pyflowkern", *sys.argv[2:]]
from pyflowkern.cli import main
main()
"""


def assert_one_line_that_names_a_file(result, folder):
    assert result.returncode == 1, result
    assert re.fullmatch(r"pyflowkern: .*'.+'\n", result.stderr), result.stderr
    assert not list(folder.rglob(".*")), "a temporary file stayed"


@pytest.fixture
def table(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    np.savetxt("t.csv", np.random.default_rng(0).normal(size=(50, 2)), delimiter=",")
    return tmp_path


@pytest.mark.parametrize("size", [40, 300, 2_000, 12_000, 24_000])
def test_a_full_disk_is_one_line_that_names_the_file(table, size):
    result = fresh.run(
        LIMITED, size, "train", "--data", "t.csv", "--flow", "RealNVP", "--steps", 4, "--out", "run",
        "--set", "every=2", "--set", "hidden=8",
    )  # fmt: skip
    assert_one_line_that_names_a_file(result, table)
    assert "run" in result.stderr


@pytest.mark.parametrize("suffix", ["csv", "npy"])
def test_samples_on_a_full_disk(table, suffix):
    run = train(TrainConfig.create({**TINY, "steps": 2, "out": "run"}))
    result = fresh.run(LIMITED, 4_096, "sample", run.out, "-n", 5_000, "--out", f"s.{suffix}")
    assert_one_line_that_names_a_file(result, table)
    assert f"s.{suffix}" in result.stderr
    assert not (table / f"s.{suffix}").exists()
