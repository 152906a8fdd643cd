"""Run many fuzz cases: ``python -m fuzz --cases 20000`` with the tests' folder on the path.

Cases run in a process of their own, so that a crash is a finding like any other; the next process goes on behind it.
"""

import argparse
import subprocess
import sys
import time
import traceback

from fuzz.cases import TARGETS, run_case
from fuzz.check import Finding


def work(targets, seeds):
    """Run cases and say before each which it is, so that a crash can be told."""
    import torch

    torch.set_num_threads(1)
    for seed in seeds:
        for target in targets:
            print("case", target, seed, flush=True)
            try:
                run_case(target, seed)
            except Finding as finding:
                print("finding", target, seed, str(finding).replace("\n", " ")[:400], flush=True)
            except Exception:
                print("broken", target, seed, traceback.format_exc()[-800:].replace("\n", " | "))


def supervise(targets, start, stop, seconds):
    safe = ["-P"] if sys.flags.safe_path else []  # the installed package, not the source tree
    findings, seed, begin, count = [], start, time.monotonic(), 0
    while seed < stop and time.monotonic() - begin < seconds:
        command = [
            sys.executable,
            *safe,
            "-m",
            "fuzz",
            "--worker",
            "--seeds",
            str(seed),
            str(stop),
        ]
        command += ["--targets", *targets]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
        last = ""
        for line in process.stdout:
            kind, _, rest = line.partition(" ")
            if kind == "case":
                last, count = rest.strip(), count + 1
            elif kind in ("finding", "broken"):
                findings.append(rest.strip())
                print(line, end="", flush=True)
            if time.monotonic() - begin > seconds:
                process.kill()
        code = process.wait()
        if code and time.monotonic() - begin <= seconds:
            findings.append(f"{last} killed its process ({code})")
            print("crash  ", findings[-1], flush=True)
            seed = int(last.split()[1]) + 1
        else:
            break
    return findings, count


def main():
    parser = argparse.ArgumentParser(prog="python -m fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=20_000, help="all targets together")
    parser.add_argument("--seeds", type=int, nargs=2, help="these seeds for each target")
    parser.add_argument("--targets", nargs="+", default=list(TARGETS), choices=list(TARGETS))
    parser.add_argument("--seconds", type=float, default=3600.0)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    start, stop = args.seeds or (0, -(-args.cases // len(args.targets)))
    if args.worker:
        work(args.targets, range(start, stop))
        return 0
    findings, count = supervise(args.targets, start, stop, args.seconds)
    print(f"{count} cases, {len(findings)} findings")
    return bool(findings)


if __name__ == "__main__":
    sys.exit(main())
