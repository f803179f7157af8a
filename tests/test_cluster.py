"""benchmarks/cluster.py: what it would do, as data; and, where namespaces can be made, what it does."""

from __future__ import annotations

import argparse
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from launch import ROOT, needs_mpi

sys.path.append(str(ROOT / "benchmarks"))
import cluster as box

SCRIPT = str(ROOT / "benchmarks" / "cluster.py")

RANK_PROGRAM = """
import os, sys
import numpy as np
import minidist as md

comm = md.comm.world()
host, across = comm.split_by_host()
n = 250_000
array = np.full(n, comm.rank, np.float32)
other = (comm.rank + comm.size // 2) % comm.size  # on the other host
theirs = comm.sendrecv(array, other, np.empty_like(array), other)
assert (theirs == other).all()
line = f"rank {comm.rank} of {comm.size}: {host.rank} of {host.size} here, host {across.rank} of {across.size}\\n"
os.write(1, line.encode())  # whole, whoever else writes
md.collectives.barrier(comm)
sys.exit(7)
"""


# -- as data --------------------------------------------------------------------------------------------------------


def example(**changes) -> box.Cluster:
    return box.Cluster(**{"hosts": 2, "ranks_per_host": 2, "bandwidth": 1e9, "pid": 4194303, **changes})


def test_figures_are_read_with_their_units():
    args = box.parse(["--bandwidth", "2.5gbit", "--latency", "50us", "--hosts", "3", "--", "python", "x.py", "--hosts"])
    assert (args.bandwidth, args.latency, args.hosts) == (2.5e9, pytest.approx(50e-6), 3)
    assert args.command == ["python", "x.py", "--hosts"]


@pytest.mark.parametrize(
    "arguments, complaint",
    [
        ([], "there is no COMMAND"),
        (["--hosts", "1", "--check"], "--hosts 1: expected 2 to 200"),
        (["--ranks-per-host", "0", "--check"], "--ranks-per-host 0"),
        (["--bandwidth", "1gb", "--check"], "'1gb': expected a bandwidth, a number and one of bit, kbit, mbit, gbit"),
        (["--bandwidth", "1kbit", "--check"], "expected 1mbit or more"),
        (["--latency", "50", "--check"], "'50': expected a time, a number and one of s, ms, us"),
        (["--mtu", "100", "--check"], "--mtu 100"),
        (["--deadline", "0", "--check"], "--deadline 0"),
    ],
)
def test_wrong_arguments_are_refused_by_name(arguments, complaint, capsys):
    with pytest.raises(SystemExit) as refused:
        box.parse(arguments)
    assert refused.value.code == 2
    assert complaint in capsys.readouterr().err


def test_a_figure_without_a_known_unit_is_refused():
    with pytest.raises(argparse.ArgumentTypeError):
        box.figure(("s",), "time")("5ms")


def test_every_command_stays_within_namespaces_that_carry_the_pid():
    plan = example(hosts=3, latency=1e-3).set_up()
    made = [command[3] for command in plan if command[:3] == ["ip", "netns", "add"]]
    assert made == [f"minidist-4194303-{name}" for name in ("switch", "host1", "host2", "host3")]
    for command in plan:
        name = command[3] if command[1] == "netns" else command[2]
        assert command[:2] in (["ip", "netns"], ["ip", "-n"], ["tc", "-n"]) and name in made
    interfaces = {word for command in plan for word in command if re.match(r"md\d", word)}
    assert interfaces == {"md4194303", "md4194303br", "md4194303p1", "md4194303p2", "md4194303p3"}
    assert all(len(name) <= 15 for name in interfaces)  # Linux's limit


def test_links_are_shaped_at_the_sender_and_where_senders_meet():
    def shaped(**changes) -> list[str]:
        plan = example(**changes).set_up()
        return [" ".join(command[command.index("dev") + 1 :]) for command in plan if command[0] == "tc"]

    bucket = "root tbf rate 1000000000bit burst 16384 limit"
    assert shaped() == [f"md4194303 {bucket} 67108864"] * 2
    assert shaped(hosts=3)[:2] == [f"md4194303 {bucket} 67108864", f"md4194303p1 {bucket} 2500000"]
    netem = "root netem delay 50us rate 1000000000bit limit 100000"
    assert shaped(latency=50e-6)[:2] == [f"md4194303 {bucket} 67108864", f"md4194303p1 {netem}"]
    assert "burst 125000 " in shaped(bandwidth=1e10)[0]


def test_the_command_learns_the_figures():
    environment = example(latency=50e-6).environment()
    assert environment["MINIDIST_CLUSTER_HOSTS"] == "2"
    assert float(environment["MINIDIST_CLUSTER_BANDWIDTH"]) == 1e9
    assert float(environment["MINIDIST_CLUSTER_LATENCY"]) == 50e-6
    command = example().mpirun("/bin/mpirun", "/tmp/launcher", ["python", "x.py"])
    assert command[:4] == ["ip", "netns", "exec", "minidist-4194303-switch"]
    assert "10.77.0.1:2,10.77.0.2:2" in command
    assert command[-4:] == ["-n", "4", "python", "x.py"]


def test_the_launcher_enters_the_namespace_of_the_address(tmp_path):
    launcher = tmp_path / "launcher"
    launcher.write_text(example().launcher())
    fake = tmp_path / "ip"
    fake.write_text('#!/bin/sh\nfor word in "$@"; do echo "<$word>"; done\n')
    fake.chmod(0o755)
    environment = {**os.environ, "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    for options in (["-x"], []):
        command = ["sh", str(launcher), *options, "10.77.0.2", '"/a/proxy"', "--port", "10.77.0.254:99"]
        told = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=20).stdout
        expected = ["netns", "exec", "minidist-4194303-host2", "sh", "-c", '"/a/proxy" --port 10.77.0.254:99']
        assert told.splitlines() == [f"<{word}>" for word in expected]


# -- what it lacks --------------------------------------------------------------------------------------------------


def fake_tool(folder: Path, name: str, says: str = "") -> None:
    (folder / name).write_text(f"#!/bin/sh\necho '{says}'\n")
    (folder / name).chmod(0o755)


def test_what_is_lacking_is_told_in_a_line(monkeypatch, tmp_path, capsys):
    def complaint() -> str:
        assert box.main(["--check"]) == 2
        told = capsys.readouterr().err
        assert told.startswith("cluster: ") and told.count("\n") == 1
        return told

    monkeypatch.setattr(box.platform, "system", lambda: "Darwin")
    assert "it needs Linux's network namespaces; this is Darwin" in complaint()
    monkeypatch.setattr(box.platform, "system", lambda: "Linux")
    monkeypatch.setattr(box.os, "geteuid", lambda: 1000)
    assert "it needs root" in complaint()
    monkeypatch.setattr(box.os, "geteuid", lambda: 0)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert "it needs ip, of the package iproute2" in complaint()
    fake_tool(tmp_path, "ip")
    assert "it needs tc, of the package iproute2" in complaint()
    fake_tool(tmp_path, "tc")
    monkeypatch.setattr(box, "find_mpirun", lambda: None)
    assert "it needs mpirun, MPICH's" in complaint()
    fake_tool(tmp_path, "mpirun", "mpirun (Open MPI) 5.0.8")
    monkeypatch.setattr(box, "find_mpirun", lambda: str(tmp_path / "mpirun"))
    assert re.search(r"needs MPICH's mpirun; .*mpirun is another: mpirun \(Open MPI\) 5\.0\.8", complaint())


def test_a_command_that_fails_while_it_is_made_is_told_too(monkeypatch):
    failed = subprocess.CompletedProcess([], 2, "", "Error: Specified qdisc kind is unknown.\n")
    monkeypatch.setattr(box.subprocess, "run", lambda command, **_: failed)
    with pytest.raises(box.Lacking, match=r"qdisc kind is unknown\. \(from: ip netns add minidist-"):
        box.make(example())
    monkeypatch.setattr(box.Cluster, "set_up", lambda self: [["tc", *self.delay()]])
    with pytest.raises(box.Lacking, match="--latency needs the kernel's netem"):
        box.make(example())


def test_only_a_living_cluster_keeps_its_namespaces():
    with subprocess.Popen(["sleep", "60"]) as other:
        assert not box.is_cluster(other.pid)  # the number is another program's now
        other.kill()
    assert not box.is_cluster(other.pid)
    with subprocess.Popen(["sh", "-c", "echo; read wait", "cluster.py"], stdin=-1, stdout=-1) as living:
        living.stdout.readline()
        assert box.is_cluster(living.pid)


# -- for real -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def network() -> None:
    """Skips where no cluster can be made."""
    process = start("--ranks-per-host", "1", "--", "true")
    _, err = finish(process)
    if process.returncode == 2:
        pytest.skip(f"no cluster can be made here: {err.strip()}")


def start(*arguments: str) -> subprocess.Popen[str]:
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    return subprocess.Popen(
        [sys.executable, SCRIPT, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "PYTHONPATH": path},
    )


def finish(process: subprocess.Popen[str], seconds: float = 60) -> tuple[str, str]:
    try:
        return process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.terminate()
        out, err = process.communicate(timeout=30)
        pytest.fail(f"cluster.py was not over after {seconds} s\n{out}\n{err}", pytrace=False)


def interfaces() -> set[str]:
    """The machine's own."""
    return set(os.listdir("/sys/class/net"))


def left_of(pid: int) -> list[str]:
    return [name for name, owner in box.namespaces_of_clusters().items() if owner == pid]


@needs_mpi
def test_ranks_on_two_hosts_talk_across_the_link(network, tmp_path):
    program, before = tmp_path / "program.py", interfaces()
    program.write_text(RANK_PROGRAM)
    process = start("--bandwidth", "200mbit", "--check", "--deadline", "40", "--", sys.executable, str(program))
    out, err = finish(process)
    assert process.returncode == 7, f"\n{out}\n{err}"  # the command's own status
    expected = [f"rank {rank} of 4: {rank % 2} of 2 here, host {rank // 2} of 2" for rank in range(4)]
    assert sorted(out.splitlines()) == expected

    # The link is what it claims to be, and the messages of 1 MB, two each way, crossed it.
    alone = re.search(r"nominal 200 Mbit/s; a TCP stream alone ([\d.]+) Mbit/s", err)
    assert alone and 100 < float(alone[1]) < 210, err
    crossed = re.findall(r"host \d sent ([\d.]+) MB and received ([\d.]+) MB", err)
    assert len(crossed) == 2
    assert all(2.0 < float(megabytes) < 2.4 for pair in crossed for megabytes in pair), crossed
    assert not left_of(process.pid)
    assert interfaces() == before


SLEEPER = "import os, sys, time; open(sys.argv[1] + str(os.getpid()), 'x'); time.sleep(100)"


def start_sleepers(folder: Path, *options: str) -> tuple[subprocess.Popen[str], list[int]]:
    """A cluster of two hosts of a sleeping rank each; and the ranks' process numbers."""
    process = start("--ranks-per-host", "1", *options, "--", sys.executable, "-c", SLEEPER, f"{folder}/rank-")
    until = time.monotonic() + 30
    while len(list(folder.glob("rank-*"))) < 2:
        assert process.poll() is None and time.monotonic() < until
        time.sleep(0.02)
    return process, [int(path.name.removeprefix("rank-")) for path in folder.glob("rank-*")]


def alive(pid: int) -> bool:
    """Whether a process runs; one that is dead but not yet waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@needs_mpi
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_leaves_nothing(network, tmp_path, number):
    process, ranks = start_sleepers(tmp_path)
    assert len(left_of(process.pid)) == 3
    process.send_signal(number)
    finish(process)
    assert process.returncode == 128 + number
    assert not left_of(process.pid)
    assert not [rank for rank in ranks if alive(rank)]


@needs_mpi
def test_the_deadline_ends_the_command(network, tmp_path):
    process, ranks = start_sleepers(tmp_path, "--deadline", "1")
    _, err = finish(process)
    assert process.returncode == 124
    assert "the command was not over after 1 s" in err
    assert not left_of(process.pid)
    assert not [rank for rank in ranks if alive(rank)]


@needs_mpi
def test_what_a_killed_cluster_left_is_removed(network, tmp_path):
    process, ranks = start_sleepers(tmp_path)
    process.kill()
    process.wait(20)
    process.stdout.close(), process.stderr.close()
    assert len(left_of(process.pid)) == 3
    cleaning = start("--clean")
    _, err = finish(cleaning)
    assert cleaning.returncode == 0
    assert err.count(f"removed minidist-{process.pid}-") == 3
    assert not left_of(process.pid)
    assert not [rank for rank in ranks if alive(rank)]
