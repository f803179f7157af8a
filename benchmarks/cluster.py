"""A cluster in a box: hosts on one Linux machine, joined by links of a chosen bandwidth, and mpirun across them.

    python benchmarks/cluster.py --hosts 2 --ranks-per-host 2 --bandwidth 1gbit -- python benchmarks/all_reduce.py
    python benchmarks/cluster.py --bandwidth 1gbit --check        # measures the link itself
    python benchmarks/cluster.py --clean                          # removes what a killed run left

Each host is a network namespace with an address of its own. A pair of veth interfaces, the two ends of a cable, joins
it to a switch: a bridge, in a namespace of its own.

    host 1  10.77.0.1 ====cable==== port 1 |        |
    host 2  10.77.0.2 ====cable==== port 2 | switch | 10.77.0.254  mpirun
    ...                                    |        |

All interfaces are made inside these namespaces, never in the machine's own, and every name carries the number of the
process that made it. `tc` shapes what each host sends and (of two hosts the one receives what the other sends; of more)
what it receives, each at most the bandwidth, at the same time. mpirun runs on the switch and reaches the hosts through
a launcher that enters their namespaces where ssh would log in; MPI is told to use TCP between hosts, and within a host
it still uses shared memory. CPU and disks stay those of one machine. The command finds the figures in its environment:
MINIDIST_CLUSTER_HOSTS, _RANKS_PER_HOST, _BANDWIDTH (bit/s), _LATENCY (s), _MTU (bytes). At the end the bytes that
crossed each cable are told.

What to expect. A TCP stream carries MTU - 52 of each MTU + 14 bytes: 99 % of the bandwidth at 9000, 96 % at 1500. The
token buckets let 16 KiB, or 0.1 ms of a fast link, through at once after a pause: 0.4 % of 4 MiB. Without --latency a
round trip takes what the kernel needs to wake two processes: 10 to 60 µs.

It needs Linux, root, iproute2 (ip, tc) and MPICH's mpirun; --latency needs the kernel's netem as well. Exit status: the
command's; 2 if something is lacking, 124 after the deadline, 128 + n after signal n.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import math
import os
import platform
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import link
from common import find_mpirun, stop_group

NETWORK = "10.77.0"  # of addresses that exist within our namespaces only
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
UNITS = {"bit": 1.0, "kbit": 1e3, "mbit": 1e6, "gbit": 1e9, "s": 1.0, "ms": 1e-3, "us": 1e-6}


class Lacking(Exception):
    """Something that a cluster needs is not here. Its text is the one line that is told."""


# -- the cluster as data --------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cluster:
    """What is to be made: names, addresses, figures, and the commands that make it."""

    hosts: int
    ranks_per_host: int
    bandwidth: float  # bit/s, each way
    latency: float = 0.0  # s, one way, beside what the kernel takes
    mtu: int = 9000  # bytes
    pid: int = 0  # of the process whose cluster it is

    @property
    def switch(self) -> str:
        return f"minidist-{self.pid}-switch"

    def host(self, number: int) -> str:
        return f"minidist-{self.pid}-host{number}"

    @property
    def namespaces(self) -> list[str]:
        return [self.switch, *(self.host(number) for number in range(1, self.hosts + 1))]

    @property
    def interface(self) -> str:
        """What a host calls its end of the cable: the same name in every host, at most 15 characters."""
        return f"md{self.pid}"

    def address(self, number: int) -> str:
        return f"{NETWORK}.{number}"

    def set_up(self) -> list[list[str]]:
        """The commands that make it, in order."""
        switch, mtu = self.switch, str(self.mtu)
        commands = []

        # 1. The namespaces: empty networks, each with a loopback interface of its own.
        for name in self.namespaces:
            commands.append(["ip", "netns", "add", name])
            commands.append(["ip", "-n", name, "link", "set", "lo", "up"])

        # 2. The switch.
        bridge = f"md{self.pid}br"
        commands.append(["ip", "-n", switch, "link", "add", bridge, "type", "bridge"])
        commands.append(["ip", "-n", switch, "link", "set", bridge, "mtu", mtu, "up"])
        commands.append(["ip", "-n", switch, "address", "add", f"{NETWORK}.254/24", "dev", bridge])

        # 3. A cable from each host to its port, made in the host's namespace with the far end in the switch's.
        for number in range(1, self.hosts + 1):
            name, port = self.host(number), f"md{self.pid}p{number}"
            cable = ["link", "add", self.interface, "mtu", mtu, "type", "veth", "peer", "name", port, "mtu", mtu]
            commands.append(["ip", "-n", name, *cable, "netns", switch])
            commands.append(["ip", "-n", name, "address", "add", f"{self.address(number)}/24", "dev", self.interface])
            commands.append(["ip", "-n", name, "link", "set", self.interface, "up"])
            commands.append(["ip", "-n", switch, "link", "set", port, "master", bridge, "up"])

            # 4. Its shapers: what the host sends; and, on the port, what comes for it. Of two hosts each has a shaped
            #    sender already; of more, several may send to one.
            send = self.bucket(queue=64 << 20)  # a host does not lose its own packets
            commands.append(["tc", "-n", name, "qdisc", "add", "dev", self.interface, "root", *send])
            if self.latency or self.hosts > 2:
                down = self.delay() if self.latency else self.bucket(queue=max(256 << 10, self.in_time(20e-3)))
                commands.append(["tc", "-n", switch, "qdisc", "add", "dev", port, "root", *down])

            # 5. The driver of a network card keeps its queue short, so that acknowledgements and short messages need
            #    not wait behind all of a long one. Here TCP itself does: 1 ms of the link for each connection.
            queued = max(64 << 10, self.in_time(1e-3))
            write = f"echo {queued} > /proc/sys/net/ipv4/tcp_limit_output_bytes"
            commands.append(["ip", "netns", "exec", name, "sh", "-c", write])
        return commands

    def in_time(self, seconds: float) -> int:
        """Bytes that a link carries in so long."""
        return math.ceil(self.bandwidth / 8 * seconds)

    def bucket(self, queue: int) -> list[str]:
        """A token bucket: so many bytes at once (the smaller, the more even), then the rate. It holds `queue` bytes."""
        burst = max(16 << 10, self.in_time(100e-6))
        return ["tbf", "rate", f"{self.bandwidth:.0f}bit", "burst", str(burst), "limit", str(queue)]

    def delay(self) -> list[str]:
        """Rate and delay in one: each packet leaves when those before it have, and `latency` later."""
        rate = ["rate", f"{self.bandwidth:.0f}bit"]
        return ["netem", "delay", f"{self.latency * 1e6:.0f}us", *rate, "limit", "100000"]  # packets

    def mpirun(self, program: str, launcher: str, command: list[str]) -> list[str]:
        """The command that runs `command` on all ranks; to be run with `environment`."""
        places = ",".join(f"{self.address(number)}:{self.ranks_per_host}" for number in range(1, self.hosts + 1))
        options = ["-launcher", "ssh", "-launcher-exec", launcher, "-hosts", places, "-localhost", f"{NETWORK}.254"]
        ranks = str(self.hosts * self.ranks_per_host)
        return ["ip", "netns", "exec", self.switch, program, *options, "-n", ranks, *command]

    def launcher(self) -> str:
        """The script that mpirun takes for ssh: called as `script -x ADDRESS WORDS...`, it runs them on that host."""
        return (
            "#!/bin/sh\n"
            'if [ "$1" = -x ]; then shift; fi\n'
            "number=${1##*.}; shift\n"  # the last part of the address
            f'exec ip netns exec "minidist-{self.pid}-host$number" sh -c "$*"\n'
        )

    def environment(self) -> dict[str, str]:
        return {
            "MPIR_CVAR_CH4_NETMOD": "ofi",  # MPICH: between hosts libfabric,
            "FI_PROVIDER": "tcp",  # and of its ways the one that uses the network
            "GLOO_SOCKET_IFNAME": self.interface,  # PyTorch's Gloo: this host's address, not the machine's
            "MINIDIST_CLUSTER_HOSTS": str(self.hosts),
            "MINIDIST_CLUSTER_RANKS_PER_HOST": str(self.ranks_per_host),
            "MINIDIST_CLUSTER_BANDWIDTH": f"{self.bandwidth:.0f}",
            "MINIDIST_CLUSTER_LATENCY": f"{self.latency:g}",
            "MINIDIST_CLUSTER_MTU": str(self.mtu),
        }

    def __str__(self) -> str:
        delay = f", latency {self.latency * 1e6:g} µs" if self.latency else ""
        control = Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()
        return (
            f"{self.hosts} hosts of {self.ranks_per_host} ranks, links of {self.bandwidth / 1e6:g} Mbit/s{delay}, "
            f"MTU {self.mtu}, TCP {control}"
        )


# -- making it, and removing it -------------------------------------------------------------------------------------


def require() -> str:
    """The path of MPICH's mpirun. Raises Lacking if it or anything else that a cluster needs is not here."""
    if platform.system() != "Linux":
        raise Lacking(f"it needs Linux's network namespaces; this is {platform.system()}")
    if os.geteuid() != 0:
        raise Lacking("it needs root, to make network namespaces and shape their links; try sudo -E")
    for tool in ("ip", "tc"):
        if shutil.which(tool) is None:
            raise Lacking(f"it needs {tool}, of the package iproute2")
    mpirun = find_mpirun()
    if mpirun is None:
        raise Lacking("it needs mpirun, MPICH's: pip install 'minidist[mpi]'")
    version = subprocess.run([mpirun, "--version"], capture_output=True, text=True, timeout=60)
    if "HYDRA" not in version.stdout:
        raise Lacking(f"it needs MPICH's mpirun; {mpirun} is another: {version.stdout.strip().partition(chr(10))[0]}")
    return mpirun


def make(cluster: Cluster) -> None:
    for command in cluster.set_up():
        done = subprocess.run(command, capture_output=True, text=True, timeout=60)
        if done.returncode:
            reason = done.stderr.strip().partition("\n")[0]
            if "netem" in command:
                reason = f"--latency needs the kernel's netem (CONFIG_NET_SCH_NETEM, module sch_netem): {reason}"
            raise Lacking(f"{reason} (from: {shlex.join(command)})")


def namespaces_of_clusters() -> dict[str, int]:
    """Every namespace that a cluster.py made: its name, and the number of the process that made it."""
    listed = subprocess.run(["ip", "netns", "list"], capture_output=True, text=True, timeout=60).stdout
    names = re.finditer(r"^(minidist-(\d+)-(?:switch|host\d+))\b", listed, re.MULTILINE)
    return {match[1]: int(match[2]) for match in names}


def is_cluster(pid: int) -> bool:
    """Whether process `pid` lives, and is a cluster.py (numbers are used again)."""
    try:
        return b"cluster" in Path(f"/proc/{pid}/cmdline").read_bytes()
    except OSError:
        return False


def remove(names: list[str]) -> None:
    """Remove namespaces, with all interfaces and processes in them: no one but the cluster's owner put any there."""
    for name in names:
        for _ in range(50):
            inside = subprocess.run(["ip", "netns", "pids", name], capture_output=True, text=True, timeout=60)
            pids = [int(pid) for pid in inside.stdout.split()]
            if not pids:
                break
            for pid in pids:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.1)
    for name in names:
        subprocess.run(["ip", "netns", "delete", name], capture_output=True, timeout=60)


def clean() -> list[str]:
    """Remove what clusters have left whose process is dead; the names of what that was."""
    left = [name for name, pid in namespaces_of_clusters().items() if pid != os.getpid() and not is_cluster(pid)]
    remove(left)
    for script in Path(tempfile.gettempdir()).glob(launcher_path("*").name):
        pid = script.name.split("-")[1]
        if pid.isdecimal() and not is_cluster(int(pid)):
            script.unlink(missing_ok=True)
            left.append(str(script))
    return left


@contextlib.contextmanager
def running(cluster: Cluster) -> Iterator[None]:
    """The cluster exists inside of the `with`, and after any end of it does not: an exception, SIGINT, SIGTERM, SIGHUP.

    A first signal becomes SystemExit(128 + its number); further ones are ignored, so that cleaning up is finished.
    """

    def ignore() -> None:
        for number in SIGNALS:
            signal.signal(number, signal.SIG_IGN)

    def end(number: int, frame: object) -> None:
        ignore()
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in SIGNALS}
    try:
        make(cluster)
        yield
    finally:
        try:
            ignore()  # a signal that comes before this line has ended ends here, and still cleans up
        finally:
            remove([name for name, pid in namespaces_of_clusters().items() if pid == cluster.pid])
            for number, handler in before.items():
                signal.signal(number, handler)


# -- using it -------------------------------------------------------------------------------------------------------


def run(cluster: Cluster, mpirun: str, command: list[str], deadline: float) -> int:
    """Run `command` on all ranks of the cluster; its exit status, or 124 if it is not over by the deadline."""
    script = launcher_path(cluster.pid)
    try:
        script.unlink(missing_ok=True)
        with open(os.open(script, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o700), "w") as file:
            file.write(cluster.launcher())
        before = traffic(cluster)
        process = subprocess.Popen(
            cluster.mpirun(mpirun, str(script), command),
            env={**os.environ, **cluster.environment()},
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            status = process.wait(deadline)
        except subprocess.TimeoutExpired:
            say(f"the command was not over after {deadline:g} s")
            status = 124
        finally:
            stop_group(process)
        for number, (old, new) in enumerate(zip(before, traffic(cluster), strict=True), start=1):
            sent, received = new[0] - old[0], new[1] - old[1]
            say(f"host {number} sent {sent / 1e6:.3f} MB and received {received / 1e6:.3f} MB")
    finally:
        script.unlink(missing_ok=True)
    return status


def launcher_path(pid: int | str) -> Path:
    return Path(tempfile.gettempdir(), f"minidist-{pid}-launcher")


def traffic(cluster: Cluster) -> list[tuple[int, int]]:
    """(bytes sent, bytes received) by each host since its interface was made, headers included."""
    counters = []
    for number in range(1, cluster.hosts + 1):
        show = ["ip", "-json", "-statistics", "-n", cluster.host(number), "link", "show", "dev", cluster.interface]
        done = subprocess.run(show, capture_output=True, text=True, timeout=60, check=True)
        statistic = json.loads(done.stdout)[0]["stats64"]
        counters.append((statistic["tx"]["bytes"], statistic["rx"]["bytes"]))
    return counters


def check(cluster: Cluster, seconds: float = 0.5) -> bool:
    """Measure the link between the first two hosts, and tell; whether it is what it claims to be."""
    caller, called = (["ip", "netns", "exec", cluster.host(number)] for number in (1, 2))
    figures = link.measure(caller, called, cluster.address(2), int(cluster.bandwidth / 8 * seconds), 60 + 20 * seconds)
    if figures is None:
        say("the link could not be measured")
        return False

    def share(bits: float) -> str:
        return f"{bits / 1e6:.1f} Mbit/s ({bits / cluster.bandwidth:.1%})"

    say(f"bandwidth: nominal {cluster.bandwidth / 1e6:g} Mbit/s; a TCP stream alone {share(figures['alone'])}")
    say(f"           both ways at once {share(figures['there'])} and {share(figures['back'])}")
    idle, busy = (f"{figures[key] * 1e6:.0f} µs" for key in ("idle", "busy"))
    nominal = f"{2 * cluster.latency * 1e6:g} µs and the kernel's time"
    say(f"round trip: nominal {nominal}; median {idle}, beside a stream {busy}")
    return 0.95 <= figures["alone"] / cluster.bandwidth <= 1.005


# -- the command line -----------------------------------------------------------------------------------------------


def say(text: str) -> None:
    """To standard error: standard output is the command's."""
    print(f"cluster: {text}", file=sys.stderr, flush=True)


def figure(units: tuple[str, ...], kind: str) -> Callable[[str], float]:
    """An argument with a unit, as tc writes them: 1gbit, 50us."""

    def parse(text: str) -> float:
        match = re.fullmatch(r"(\d+(?:\.\d*)?)([a-z]+)", text.lower())
        if not match or match[2] not in units:
            raise argparse.ArgumentTypeError(f"{text!r}: expected a {kind}, a number and one of {', '.join(units)}")
        return float(match[1]) * UNITS[match[2]]

    return parse


def parse(arguments: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], usage="cluster.py [options] -- COMMAND ...", allow_abbrev=False
    )
    bandwidth, seconds = figure(("bit", "kbit", "mbit", "gbit"), "bandwidth"), figure(("s", "ms", "us"), "time")
    parser.add_argument("--hosts", type=int, default=2, help="2 to 200 (default 2)")
    parser.add_argument("--ranks-per-host", type=int, default=2, metavar="N", help="(default 2)")
    parser.add_argument("--bandwidth", type=bandwidth, default=1e9, metavar="RATE", help="each way (default 1gbit)")
    parser.add_argument(
        "--latency", type=seconds, default=0.0, metavar="TIME", help="one way, added (50us; default 0s)"
    )
    parser.add_argument("--mtu", type=int, default=9000, metavar="BYTES", help="largest packet (default 9000)")
    parser.add_argument("--deadline", type=float, default=1800, metavar="SECONDS", help="for COMMAND (default 1800)")
    parser.add_argument("--check", action="store_true", help="measure the link first; exit 1 if it is not as it claims")
    parser.add_argument("--clean", action="store_true", help="remove what killed runs left, and end")
    parser.add_argument("command", nargs=argparse.REMAINDER, help="what each rank runs")
    args = parser.parse_args(arguments)
    args.command = args.command[1:] if args.command[:1] == ["--"] else args.command
    if not 2 <= args.hosts <= 200:
        parser.error(f"--hosts {args.hosts}: expected 2 to 200")
    if args.ranks_per_host < 1:
        parser.error(f"--ranks-per-host {args.ranks_per_host}: expected 1 or more")
    if args.bandwidth < 1e6:
        parser.error(f"--bandwidth {args.bandwidth:g} bit/s: expected 1mbit or more")
    if not 576 <= args.mtu <= 65535:
        parser.error(f"--mtu {args.mtu}: expected 576 to 65535")
    if not args.deadline > 0:
        parser.error(f"--deadline {args.deadline:g}: expected more than 0")
    if not (args.command or args.check or args.clean):
        parser.error("there is no COMMAND: give one after --, or --check, or --clean")
    return args


def main(arguments: list[str]) -> int:
    args = parse(arguments)
    cluster = Cluster(args.hosts, args.ranks_per_host, args.bandwidth, args.latency, args.mtu, os.getpid())
    try:
        mpirun = require()
        for name in clean():
            say(f"removed {name}, left by a run that was killed")
        if args.clean:
            return 0
        with running(cluster):
            say(str(cluster))
            status = 0
            if args.check and not check(cluster):
                say("the link is not as it claims to be: expected 95 % to 100.5 % of its bandwidth")
                status = 1
            if args.command:
                status = run(cluster, mpirun, args.command, args.deadline) or status
            return status
    except Lacking as lacking:
        say(str(lacking))
        return 2


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
