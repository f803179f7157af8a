"""The machine and its Python: versions, BLAS, cores, memory, shared memory, the files of MNIST."""

from __future__ import annotations

import hashlib
import mmap
import os
import platform
import re
import sys
import tempfile
from pathlib import Path

import numpy as np

from .. import __version__
from ..comm import threads
from ..data.mnist import FOLDER
from .asking import HOME, pip
from .finding import Finding, ok, problem, warning

MB, GB = 1 << 20, 1 << 30
ENOUGH_MEMORY = GB  # bytes: four ranks of the MNIST example take some 150 MB each
ENOUGH_SHARED = 128 * MB  # bytes: containers have 64 MiB unless told otherwise, and MPI alone may take that
OLDEST_PYTHON, OLDEST_NUMPY = (3, 11), 2
UNLIMITED = 1 << 60  # what cgroups say in place of a number of bytes is above this


def size(nbytes: float) -> str:
    """Bytes in words."""
    return f"{nbytes / GB:.1f} GiB" if nbytes >= GB else f"{nbytes / MB:.0f} MiB"


def python() -> Finding:
    """Python, the system, and which minidist this is."""
    version = platform.python_version()
    text = f"{version}, {platform.system()} {platform.release()} {platform.machine()}; minidist {__version__} in {HOME}"
    if sys.version_info[:2] < OLDEST_PYTHON:
        wanted = ".".join(map(str, OLDEST_PYTHON))
        return problem("Python", text, f"minidist needs Python {wanted} or newer: python{wanted} -m venv .venv")
    return ok("Python", text)


def numpy() -> Finding:
    """NumPy, its BLAS, and how many threads a rank will give it."""
    from threadpoolctl import threadpool_info

    if int(np.__version__.split(".")[0]) < OLDEST_NUMPY:
        return problem("NumPy", np.__version__, pip(f"numpy>={OLDEST_NUMPY}"))
    pools = [pool for pool in threadpool_info() if pool["user_api"] == "blas"]
    built = np.show_config("dicts").get("Build Dependencies", {}).get("blas", {}).get("name", "")
    names = [f"{pool['internal_api']} {pool['version'] or ''}".strip() for pool in pools] or [built or "no BLAS"]
    text = f"{np.__version__}, {', '.join(names)}"
    if not pools and built in ("", "none", "lapack_lite"):
        return warning("NumPy", f"{text}: matrix products are slow", pip("--force-reinstall", "numpy"))
    cores = threads.cores()
    wish = next(((name, os.environ[name]) for name in threads.USER_CHOICES if os.environ.get(name)), None)
    if wish is None:
        shares = ", ".join(f"{max(1, cores // ranks)} on {ranks}" for ranks in (1, 2, 4))
        return ok("NumPy", f"{text}; threads of a rank: {shares} rank{'s'}")
    name, value = wish
    if not value.isdecimal() or not 0 < int(value) <= cores:
        return warning("NumPy", f"{text}; {name}={value}, where there are {cores} cores", f"unset {name}")
    return ok("NumPy", f"{text}; threads of a rank: {value} ({name})")


def cores() -> Finding:
    """Cores there are, may be used (affinity), and may be used all the time (a container's quota)."""
    there, usable, quota = os.cpu_count() or 1, threads.cores(), cpu_quota()
    text = f"{usable} of {there}" if usable < there else str(there)
    if quota is not None and quota < usable:
        share = max(1, int(quota))
        return warning(
            "cores",
            f"{text}, but a container's quota of {quota:g}: more threads than that wait for one another",
            f"export OMP_NUM_THREADS={share}",
        )
    if usable == 1:
        text += ": ranks take turns on it, which is slower than one rank, and as right"
    return ok("cores", text)


def memory() -> Finding:
    """Memory of the machine, or of the container if that is less."""
    there, free = meminfo()
    limit, used = cgroup_memory()
    text = "" if there is None else f"{size(there)}, {size(free)} available"
    if limit is not None and (there is None or limit < there):
        text += f"{'; ' if text else ''}a container's limit of {size(limit)}, {size(max(0, limit - used))} of it left"
        free = min(free, max(0, limit - used)) if there is not None else max(0, limit - used)
    if not text:
        return ok("memory", "this system does not tell")
    if free < ENOUGH_MEMORY:
        return warning("memory", f"{text}: little for four ranks", "mpirun -n 2 python -m minidist.examples.mnist")
    return ok("memory", text)


def shared_memory(folder: Path = Path("/dev/shm")) -> Finding:
    """Where ranks of a host exchange what they share: how much there is, and whether it can be used."""
    about, more = "shared memory", "docker run --shm-size=1g …   (Kubernetes: an emptyDir of medium Memory at /dev/shm)"
    if not folder.is_dir():
        if sys.platform == "linux":
            return problem(about, f"there is no {folder}", f"mount -t tmpfs -o size=1g tmpfs {folder}")
        return ok(about, f"files in {tempfile.gettempdir()}: this system has no {folder}")
    room = os.statvfs(folder)
    whole, free = room.f_blocks * room.f_frsize, room.f_bavail * room.f_frsize
    text = f"{folder}: {size(whole)}, {size(free)} free"
    try:
        file, name = tempfile.mkstemp(prefix="minidist-doctor-", dir=folder)
        try:
            os.unlink(name)
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file, 0, MB)
            else:
                os.ftruncate(file, MB)
            with mmap.mmap(file, MB) as view:
                view[:4] = b"here"
        finally:
            os.close(file)
    except OSError as error:
        if whole and free < MB:
            return problem(about, f"{text}: it is full, maybe of what killed runs left", f"ls -lS {folder}")
        return problem(about, f"{text}, but it cannot be written: {error.strerror or error}", f"chmod 1777 {folder}")
    if whole < ENOUGH_SHARED:
        return warning(about, f"{text}: MPI or large arrays of several ranks may not fit", more)
    if free < ENOUGH_SHARED // 2:
        return warning(about, f"{text}: almost full, maybe of what killed runs left", f"ls -lS {folder}")
    return ok(about, text)


def mnist(folder: Path = FOLDER) -> Finding:
    """MNIST's four files, by the check sums that stand in the note beside them."""
    mend = mend_mnist(folder)
    note = (folder / "README.md").read_text("utf-8") if (folder / "README.md").exists() else ""
    rows = re.findall(r"\| (\S+)\.gz \| (\w{64}) \| (\w{64}) \|", note)
    if len(rows) != 4:
        return problem("MNIST", f"{folder} lacks the note with its files' check sums", mend)
    total = 0
    for name, packed, unpacked in rows:
        paths = [(path, sum_) for path, sum_ in ((folder / f"{name}.gz", packed), (folder / name, unpacked))]
        found = next(((path, sum_) for path, sum_ in paths if path.exists()), None)
        if found is None:
            return problem("MNIST", f"{folder} lacks {name}.gz", mend)
        content = found[0].read_bytes()
        if hashlib.sha256(content).hexdigest() != found[1]:
            return problem("MNIST", f"{found[0]} is damaged: its {len(content):,} bytes have another check sum", mend)
        total += len(content)
    return ok("MNIST", f"four files in {folder}, {size(total)}, check sums right")


def mend_mnist(folder: Path) -> str:
    """The command that brings the files back: from the repository where this is one, else with the package."""
    if folder.is_relative_to(HOME) and (HOME / ".git").exists():
        return f"git -C {HOME} checkout -- {folder.relative_to(HOME)}"
    return pip("--force-reinstall", "--no-deps", "minidist")


# -- what the system says -----------------------------------------------------------------------------------------


def meminfo(file: Path = Path("/proc/meminfo")) -> tuple[int | None, int]:
    """(bytes of memory, bytes available); (None, 0) where the system does not tell."""
    try:
        found = dict(re.findall(r"^(\w+):\s+(\d+) kB", file.read_text(), re.MULTILINE))
        return int(found["MemTotal"]) * 1024, int(found["MemAvailable"]) * 1024
    except (OSError, KeyError):
        pass
    try:
        there = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
        return (there, there) if there > 0 else (None, 0)
    except (AttributeError, ValueError, OSError):
        return None, 0


def _numbers(*paths: Path) -> list[int] | None:
    """The numbers in the first of these files that exists; "max" is left out."""
    for path in paths:
        try:
            return [int(word) for word in path.read_text().split() if word.lstrip("-").isdecimal()]
        except OSError:
            continue
    return None


def _own(controller: str, root: Path, file: str) -> list[Path]:
    """Where this process's cgroup may keep a file: of version 2, of version 1, and their roots."""
    try:
        lines = Path("/proc/self/cgroup").read_text().splitlines()
    except OSError:
        lines = []
    groups = {names: path.strip("/") for _, names, path in (line.split(":", 2) for line in lines)}
    of_version_1 = next((path for names, path in groups.items() if controller in names.split(",")), "")
    return [root / groups.get("", "") / file, root / file, root / controller / of_version_1 / file,
            root / controller / file]  # fmt: skip


def cpu_quota(root: Path = Path("/sys/fs/cgroup")) -> float | None:
    """Cores' worth of time that a container may take; None: as much as there is."""
    two = _numbers(*_own("cpu", root, "cpu.max"))  # "quota period", or "max period"
    if two is not None:
        return two[0] / two[1] if len(two) == 2 else None
    quota, period = (_numbers(*_own("cpu", root, f"cpu.cfs_{name}_us")) for name in ("quota", "period"))
    return quota[0] / period[0] if quota and period and quota[0] > 0 else None


def cgroup_memory(root: Path = Path("/sys/fs/cgroup")) -> tuple[int | None, int]:
    """(bytes a container may take, bytes it has taken); (None, 0): as much as there is."""
    for most, taken in (("memory.max", "memory.current"), ("memory.limit_in_bytes", "memory.usage_in_bytes")):
        limit, used = (_numbers(*_own("memory", root, name)) for name in (most, taken))
        if limit and limit[0] < UNLIMITED:
            return limit[0], used[0] if used else 0
    return None, 0
