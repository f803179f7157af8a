"""GPUs: the driver, CuPy, and whether MPI may be handed their memory. Without a GPU all of it is fine too."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import sys
from dataclasses import dataclass

from .asking import Answer, ask, inside, pip, shell, with_minidist
from .finding import Finding, ok, problem, warning

PACKAGES = ("cupy", "cupy-cuda11x", "cupy-cuda12x", "cupy-cuda13x")
CUPY_DEADLINE = 60.0  # seconds: on a machine's first day CuPy compiles


@dataclass
class Driver:
    """What nvidia-smi says. cuda: the newest CUDA that the driver knows"""

    version: str
    cuda: tuple[int, int] | None
    gpus: list[str]


def find_driver(deadline: float) -> Driver | str | None:
    """The NVIDIA driver and its GPUs; None: there is no nvidia-smi; a string: why it fails."""
    smi = shutil.which("nvidia-smi")
    if smi is None:
        return None
    query = [smi, "--query-gpu=driver_version,name,memory.total", "--format=csv,noheader"]
    try:
        answer = ask(query, deadline)
        if answer.status is None:
            return f"nvidia-smi was not over after {deadline:g} s"
        if answer.status:
            return f"nvidia-smi fails: {answer.last_words()}"
        rows = [[cell.strip() for cell in line.split(",")] for line in answer.out.splitlines() if line.count(",") == 2]
        cuda = re.search(r"CUDA Version:\s*(\d+)\.(\d+)", ask([smi], deadline).out)
    except OSError as error:
        return f"nvidia-smi cannot be started: {error}"
    version = rows[0][0] if rows else ""
    return Driver(version, (int(cuda[1]), int(cuda[2])) if cuda else None, [f"{name}, {mem}" for _, name, mem in rows])


def installed() -> list[tuple[str, str]]:
    """(name, version) of each package that brings CuPy."""
    found = []
    for name in PACKAGES:
        try:
            found.append((name, importlib.metadata.version(name)))
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def fitting(driver: Driver | str | None) -> str:
    """The CuPy for a driver: of CUDA 13 if it knows that."""
    new = isinstance(driver, Driver) and driver.cuda is not None and driver.cuda >= (13, 0)
    return f"cupy-cuda{13 if new else 12}x[ctk]"


def gpus(deadline: float) -> tuple[Finding, bool]:
    """(what there is to say of CuPy and GPUs, whether they can be used)."""
    about, driver, packages = "GPU", find_driver(deadline), installed()
    cards = driver.gpus if isinstance(driver, Driver) else []
    has = " and ".join(f"{name} {version}" for name, version in packages)
    if isinstance(driver, str):
        return warning(about, f"{driver}; everything runs on the CPU", "nvidia-smi"), False
    if len(packages) > 1:
        text = f"{has} are both installed, and overwrite one another's files"
        names = [name for name, _ in packages]
        remove = shell(sys.executable, "-m", "pip", "uninstall", "--yes", *names)
        return problem(about, text, f"{remove} && {pip(fitting(driver))}"), False
    if not cards and not packages:
        what = "no NVIDIA driver here" if driver is None else "a driver, but no GPU"
        return ok(about, f"{what}: everything runs on the CPU"), False
    there = f"{len(cards)} × {cards[0]}, driver {driver.version}" if driver and cards else "nvidia-smi shows no GPU"
    if not packages:
        return warning(about, f"{there}; CuPy is not installed, so the CPU is used", pip(fitting(driver))), False
    answer = ask(inside("gpu"), max(deadline, CUPY_DEADLINE), with_minidist())
    found = answer.json() or {"error": answer.last_words()}
    if answer.status is None:
        return problem(about, f"{there}; {has} did not answer in time", "nvidia-smi"), False
    if "error" in found and not cards:
        return ok(about, f"{there}, so {has} is of no use: everything runs on the CPU"), False
    if "error" in found:
        remove = shell(sys.executable, "-m", "pip", "uninstall", "--yes", packages[0][0])
        text = f"{there}; {has} cannot use it: {found['error']}"
        return problem(about, text, f"{remove} && {pip(fitting(driver))}"), False
    if not found["right"]:
        return problem(about, f"{there}; {has}: a product of two matrices is wrong", "nvidia-smi -q -d ECC"), False
    return ok(about, f"{there}; {has} can use {found['count']}"), True


def cuda_aware(ring: Answer | None) -> Finding:
    """Whether MPI takes GPU memory as it is, by what the ring's ranks found."""
    about, wish = "CUDA-aware MPI", os.environ.get("MINIDIST_CUDA_AWARE")
    said = (ring.json() or {}).get("cuda_aware") if ring is not None else None
    if said is None:
        return ok(about, "not known, for no ring was run")
    by_wish = f" (MINIDIST_CUDA_AWARE={wish})" if wish is not None else ""
    if said:
        return ok(about, f"yes{by_wish}: GPU memory is sent as it is")
    return ok(about, f"no{by_wish}: arrays on a GPU go by way of pinned host memory")


def after_gpu_ring(finding: Finding, ring: Answer | None) -> Finding:
    """A ring of GPU arrays that fails where one of host memory did not: mostly MPI's word on CUDA was wrong."""
    aware = (ring.json() or {}).get("cuda_aware") if ring is not None else None
    if finding.level == "problem" and aware:
        finding.remedy = "export MINIDIST_CUDA_AWARE=0"
    return finding
