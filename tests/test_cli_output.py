"""The command line where output cannot be written, a run cannot be resumed, or reading would block."""

import os

import fresh
import pytest


def command(tmp_path, *arguments, **streams):
    """Run the command line in a separate process."""
    main = "from pyflowkern.cli import main; main()"
    return fresh.run(main, *arguments, cwd=tmp_path, **streams)


def refuses(tmp_path, *arguments):
    """Assert exit code 2 and that nothing was written; return the one line of stderr."""
    before = sorted(tmp_path.rglob("*"))
    result = command(tmp_path, *arguments)
    assert (result.returncode, result.stdout) == (2, ""), result
    assert result.stderr.startswith("pyflowkern: ")
    assert len(result.stderr.splitlines()) == 1
    assert sorted(tmp_path.rglob("*")) == before, "something was written"
    return result.stderr


def test_output_that_cannot_be_written_is_one_line(tmp_path):
    with open("/dev/full", "w") as full:
        result = command(tmp_path, "info", stdout=full)
    assert result.returncode == 1
    assert result.stderr == "pyflowkern: standard output: No space left on device\n"


def test_a_closed_pipe_ends_the_command_quietly(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    try:
        result = command(tmp_path, "info", stdout=writer)
    finally:
        os.close(writer)
    assert (result.returncode, result.stderr) == (1, "")


@pytest.mark.parametrize("minutes", ["nan", "inf"])
def test_a_demo_needs_a_number_of_minutes(minutes, tmp_path):
    assert "minutes" in refuses(tmp_path, "demo", "--minutes", minutes, "--out", "demo")


def test_a_demo_that_cannot_be_resumed_is_one_line(tmp_path):
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo/comparison.json").write_text('{"seconds": [1]')
    (tmp_path / "demo/config.yaml").write_text("steps: 2\n")
    line = refuses(tmp_path, "demo", "--resume", "--out", "demo")
    assert "demo/comparison.json: is damaged" in line


def test_a_config_that_is_a_pipe_is_refused(tmp_path):
    os.mkfifo(tmp_path / "run.yaml")
    assert "run.yaml: is a named pipe" in refuses(tmp_path, "train", "run.yaml")


def test_a_flow_larger_than_memory_is_one_line(tmp_path):
    options = ("--data", "digits", "--set", f"hidden={10**12}")
    assert "Glow cannot be built for (1, 8, 8)" in refuses(tmp_path, "train", *options)


def test_a_comparison_on_the_command_line(tmp_path):
    rows = "\n".join(f"{i % 7},{i % 11}" for i in range(60))
    (tmp_path / "t.csv").write_text(rows)
    options = ("--set", "hidden=4", "--set", "batch_size=16", "--steps", "2", "--out", "c")
    flows = ("--flow", "MAF,transforms=1", "--flow", "MAF")
    result = command(tmp_path, "compare", "--data", "t.csv", *flows, *options)
    assert result.returncode == 0, result
    lines = result.stdout.splitlines()
    head = next(i for i, line in enumerate(lines) if line.startswith("flow  "))
    assert {line.split()[0] for line in lines[head + 1 : head + 3]} == {"MAF", "MAF-2"}
    assert lines[head + 1].count("best") == 1
    assert lines[head + 3] == "held-out nats are of the log-density: higher is better"
    assert "two flows" in refuses(tmp_path, "compare", "--data", "t.csv", "--flow", "MAF")
