"""`python -m minidist doctor`: is this machine ready? One screen, with a remedy for each thing that is wrong.

The doctor's own process opens neither MPI nor CUDA: other processes are asked (inside.py), each under a deadline
(asking.py), so that nothing makes it hang.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from dataclasses import asdict
from pathlib import Path

from ..comm.world import launched
from . import gpu, machine, mpi
from .finding import Finding, conclusion, guarded, problem, screen, terminal_width, wants_colours, warning


def examine(deadline: float = 30.0) -> list[Finding]:
    """All that there is to say of this machine. `deadline`: seconds that any one thing asked may take."""
    findings = [
        guarded("Python", machine.python),
        guarded("NumPy", machine.numpy),
        guarded("cores", machine.cores),
        guarded("memory", machine.memory),
        of_shared := guarded("shared memory", machine.shared_memory),
        guarded("MNIST", machine.mnist),
    ]
    of_library, loaded = mpi.library(deadline)
    started_by = launched()
    if started_by is not None:
        text = f"the doctor itself was started by a launcher, as one of {started_by[1]} ranks: no ring within it"
        return [*findings, of_library, problem("launcher", text, "python -m minidist doctor")]

    launcher = mpi.find_launcher(deadline)
    of_launcher = guarded("launcher", mpi.launcher, launcher, loaded)
    findings += [of_library, of_launcher]
    of_match = None
    if launcher is not None:
        if loaded is not None:
            of_match = guarded("match", mpi.match, launcher, loaded)
            findings.append(of_match)
        findings.append(guarded("slots", mpi.slots, launcher))
        findings.append(guarded("user", mpi.as_root, launcher))
    of_ring, answer = None, None
    asleep = launcher is not None and launcher.name == "Slurm" and of_launcher.level != "ok"  # outside of any job
    if launcher is not None and loaded is not None and not asleep:
        of_ring, answer = mpi.ring(launcher, loaded, deadline)
        findings.append(of_ring)
        for cause in (of_shared, of_match):
            if cause is not None and of_ring.level == cause.level == "problem":
                of_ring.remedy = cause.remedy

    of_gpu, usable = gpu.gpus(deadline)
    findings.append(of_gpu)
    if usable:
        findings.append(guarded("CUDA-aware MPI", gpu.cuda_aware, answer))
        if launcher is not None and of_ring is not None and of_ring.level != "problem":
            finding, _ = mpi.ring(launcher, loaded, max(deadline, gpu.CUPY_DEADLINE), "gpu-ring")
            findings.append(gpu.after_gpu_ring(finding, answer))
    return findings


def main(argv: list[str] | None = None) -> None:
    """The command line. Exit status 0: nothing is a problem; 1: something is"""
    parser = argparse.ArgumentParser(
        "python -m minidist doctor", description="Is this machine ready? A line each, with a remedy for what is wrong."
    )
    parser.add_argument("--json", nargs="?", const="-", metavar="FILE", help="write it as JSON, to standard output (-)")
    parser.add_argument(
        "--deadline", type=float, default=30, metavar="SECONDS", help="for each thing asked (%(default)g)"
    )
    args = parser.parse_args(argv)
    if not args.deadline > 0:
        parser.error(f"--deadline {args.deadline:g}: expected seconds above 0")
    place = launched()
    if place is not None and place[0] > 0:
        sys.exit(1)  # the first of the ranks says why
    start = time.perf_counter()
    findings = examine(args.deadline)
    ready = all(finding.level != "problem" for finding in findings)
    if args.json != "-":
        print(screen(findings, wants_colours(sys.stdout), terminal_width()))
    if args.json:
        found = {"ready": ready, "conclusion": conclusion(findings), "seconds": round(time.perf_counter() - start, 3)}
        text = json.dumps({**found, "findings": [asdict(finding) for finding in findings]}, ensure_ascii=False)
        if args.json == "-":
            print(text)
        else:
            Path(args.json).write_text(text + "\n", "utf-8")
    sys.exit(0 if ready else 1)
