"""Run many fuzz cases: ``python -m fuzz --cases 20000`` with the tests' folder on the path.

Cases run in a process of their own, so that a crash is a finding like any other; the next process goes on behind it.
A case that takes ``LONGEST`` seconds ends its process, too.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
import traceback
from functools import partial
from pathlib import Path

from fuzz.cases import TARGETS, run_case
from fuzz.check import Finding

#: Seconds of a case; the largest takes a tenth of one, sanitizers and a busy machine make it slower.
LONGEST = 300
#: Cases of a process: what a process keeps (torch's compiled convolutions) does not grow for ever.
BATCH = 50_000


def work(targets, numbers, run):
    """Run cases and say before each which it is, so that a crash can be told."""
    import torch

    torch.set_num_threads(1)
    for number in numbers:
        seed, target = number // len(targets), targets[number % len(targets)]
        print("case", number, target, seed, flush=True)
        signal.alarm(LONGEST)  # by default it ends the process, also one that hangs in a kernel
        try:
            run(target, seed)
        except Finding as finding:
            print("finding", target, seed, str(finding).replace("\n", " ")[:400], flush=True)
        except Exception:
            print("broken", target, seed, traceback.format_exc()[-800:].replace("\n", " | "))


def supervise(command, numbers, seconds):
    """Run cases by processes; return the findings, and how many cases were begun.

    It ends early after so many seconds, or by SIGTERM where :func:`main` has set it up.
    """
    findings, next_case, begin, count = [], numbers.start, time.monotonic(), 0
    while next_case < numbers.stop and time.monotonic() - begin < seconds:
        stop = min(numbers.stop, next_case + BATCH)
        process = subprocess.Popen(
            [*command, "--worker", str(next_case), str(stop)], stdout=subprocess.PIPE, text=True
        )
        last, over = "before its first case", False
        try:
            for line in process.stdout:
                kind, _, rest = line.strip().partition(" ")
                if kind == "case":
                    number, _, last = rest.partition(" ")
                    next_case, count = int(number) + 1, count + 1
                elif kind in ("finding", "broken"):
                    findings.append(rest)
                    print(line, end="", flush=True)
                if time.monotonic() - begin > seconds:
                    raise Ended
        except Ended:
            over = True
            process.kill()
        code = process.wait()
        if over:
            break
        if code:
            findings.append(f"{last} ended its process ({code})")
            print("crash  ", findings[-1], flush=True)
            if last.startswith("before"):
                break
    return findings, count


class Ended(Exception):
    """Raised when no more cases are wanted."""


def end(*_):
    raise Ended


def rule_of(args):
    """Return what runs a case."""
    if args.threads:
        from fuzz.threads import Threads

        return Threads(args.threads)
    return partial(run_case, crashes_only=args.crashes_only)


def main():
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="all targets together")
    parser.add_argument("--first", type=int, default=0, help="the first seed of each target")
    parser.add_argument("--seeds", type=int, nargs=2, help="these seeds for each target")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument(
        "--crashes-only",
        action="store_true",
        help="the same calls without references: what may be found is a crash, a sanitizer's report or an error that "
        "is neither ValueError nor TypeError",
    )
    parser.add_argument(
        "--threads", type=int, default=0, help="each call by so many threads at once"
    )
    parser.add_argument("--json", type=Path, help="write the counts there")
    parser.add_argument("--worker", type=int, nargs=2, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args.targets, range(*args.worker), rule_of(args))
        return 0
    count = -(-args.cases // len(args.targets))
    start, stop = args.seeds or (args.first, args.first + count)
    safe = ["-P"] if sys.flags.safe_path else []  # the installed package, not the source tree
    command = [sys.executable, *safe, "-m", "fuzz", "--targets", *args.targets]
    command += ["--crashes-only"] if args.crashes_only else []
    command += ["--threads", str(args.threads)] if args.threads else []
    begin, size = time.monotonic(), len(args.targets)
    signal.signal(signal.SIGTERM, end)
    findings, count = supervise(command, range(start * size, stop * size), args.seconds)
    spent = time.monotonic() - begin
    print(f"{count} cases, {len(findings)} findings, {spent:.0f} s")
    if args.json:
        args.json.write_text(
            json.dumps({"cases": count, "seconds": round(spent), "findings": findings})
        )
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
