"""``python -m bench.faults.kills --times 50``: ``kill -9`` at random moments of ``pyflowkern train``.

Each trial starts a run, kills it after a random part of half the time that a whole run takes, and resumes and kills it
until ``--each`` kills have met it or it has ended; then it is resumed to its end.  The weights, averaged and trained,
the state of the optimizer and the scores must be those of a run that nobody killed, bit by bit, and every checkpoint on
the way must be whole.  Runs fork from a process that has imported Lightning, which takes longer than such a training.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch

sys.path.append(str(Path(__file__).resolve().parents[2] / "tests"))
import fresh

from bench.faults import _record
from pyflowkern.train.checkpoint import load_checkpoint

__all__ = ["kills"]

OPTIONS = [
    "--flow",
    "RealNVP",
    "--set",
    "flow_args.steps=2",
    "--set",
    "hidden=8",
    "--steps",
    "400",
]
OPTIONS += ["--set", "every=10", "--batch-size", "16", "--set", "warmup=5"]


def _start(*words: object, folder: Path) -> fresh.Process:
    return fresh.Process("from pyflowkern.cli import main; main()", *words, cwd=folder)


def _finish(process: fresh.Process) -> None:
    with process:
        error = process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"a run ended with {process.returncode}: {error[-500:]}")


def _go_on(run: Path, folder: Path) -> fresh.Process:
    """Resume a run, or start it where a kill came before its folder held a config."""
    if (run / "config.yaml").exists():
        return _start("train", "--resume", run, folder=folder)
    return _start("train", "--data", "t.csv", *OPTIONS, "--out", run, folder=folder)


def _facts(run: Path) -> dict[str, Any]:
    checkpoint = load_checkpoint(run)
    rows = checkpoint["callbacks"]["History"]["rows"]
    return {
        "weights": checkpoint["state_dict"],
        "optimizer": checkpoint["optimizer_states"][0]["state"],
        "scores": [(row["step"], row["train"], row["held_out"]) for row in rows],
    }


def _differs(a: Any, b: Any) -> bool:
    if isinstance(a, dict):
        return a.keys() != b.keys() or any(_differs(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) != len(b) or any(map(_differs, a, b))
    if isinstance(a, torch.Tensor):
        return not torch.equal(a, b)
    return bool(a != b and a == a)


def _trial(
    run: Path, folder: Path, moments: list[float], whole: dict[str, Any]
) -> tuple[int, list[int], str]:
    """Kill a run at these moments and let it end; return kills that met it, steps of checkpoints, what is wrong."""
    met, steps = 0, []
    for moment in moments:
        with _go_on(run, folder) as process:
            time.sleep(moment)
            with suppress(ProcessLookupError):  # it may have ended already
                process.kill()
            process.communicate()
        if process.returncode == 0:  # at its end before the moment
            break
        met += process.returncode == -signal.SIGKILL
        for path in run.glob("*.ckpt"):
            step = load_checkpoint(path)["pyflowkern"]["progress"][0]  # raises for a torn one
            steps += [step] if path.name == "last.ckpt" else []
    _finish(
        _go_on(run, folder)
    )  # also of a run at its end: a kill may have come before its last picture
    found = _facts(run)
    wrong = [name for name in whole if _differs(whole[name], found[name])]
    left = [p.name for p in run.iterdir() if p.name.endswith(".tmp")]
    return met, steps, ", ".join(wrong + left)


def kills(times: int, seed: int = 0, each: int = 5) -> dict[str, Any]:
    """Kill runs so often; return how many kills met a run and the ways in which results differ."""
    draw = random.Random(seed)
    os.environ["OMP_NUM_THREADS"] = "1"
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        table = np.random.default_rng(0).normal(size=(200, 2))
        np.savetxt(folder / "t.csv", table, delimiter=",")
        fresh.run("pass")  # from now on the large imports are done
        begin = time.monotonic()
        _finish(_go_on(folder / "whole", folder))
        seconds = time.monotonic() - begin
        whole = _facts(folder / "whole")
        met, trials, wrong, reached = 0, 0, [], []
        while met < times:
            moments = [draw.uniform(0, seconds / 2) for _ in range(min(each, times - met))]
            found = _trial(folder / f"run{trials}", folder, moments, whole)
            met, trials, reached = met + found[0], trials + 1, reached + found[1]
            wrong += [found[2]] if found[2] else []
            print(f"{met} kills, {trials} runs, {len(wrong)} that differ", flush=True)
    return {
        "kills": met,
        "runs": trials,
        "seed": seed,
        "seconds": round(seconds, 1),
        "steps": reached,
        "differ": wrong,
    }


def main() -> int:
    """Run from the command line, and write the result."""
    parser = argparse.ArgumentParser(prog="python -m bench.faults.kills", description=__doc__)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--each", type=int, default=5, help="kills a run, before it may end")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=_record.RESULTS)
    args = parser.parse_args()
    result = kills(args.times, args.seed, args.each)
    steps = result["steps"]
    result |= {
        "tried": "`kill -9` at random moments of `pyflowkern train`, then resumed to the end",
        "amount": f"{result['kills']} kills of {result['runs']} runs; checkpoints found at {len(set(steps))} steps",
        "found": f"{len(result['differ'])} runs that differ from the uninterrupted one in a bit, no torn checkpoint",
        "command": f"python -m bench.faults.kills --times {args.times}",
    }
    print(_record.write("kills", result, args.out), result["found"])
    return int(bool(result["differ"]))


if __name__ == "__main__":
    sys.exit(main())
