"""How fast is a link? Bandwidth and round-trip time of TCP between two ends of it, by sockets alone.

cluster.py starts the two ends, each in its host's namespace, by `measure`.
"""

from __future__ import annotations

import json
import socket
import statistics
import struct
import subprocess
import sys
import threading
import time

from common import stop_group

PORT = 7777


def measure(caller: list[str], called: list[str], address: str, volume: int, deadline: float) -> dict | None:
    """The figures, in bit/s and seconds, of streams of `volume` bytes; None if it fails.

    `caller` and `called` are what to put before a command to run it on either end, `address` that of the called one.
    """
    ends = []
    for role, there in (("called", called), ("caller", caller)):
        command = [*there, sys.executable, __file__, role, address, str(volume)]
        ends.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True, start_new_session=True))
    try:
        return json.loads(ends[1].communicate(timeout=deadline)[0])
    except (subprocess.TimeoutExpired, json.JSONDecodeError):
        return None
    finally:
        for process in ends:
            stop_group(process)


def one_end(calls: bool, address: str, volume: int) -> None:
    """The end that calls, which also prints all figures; or the one that is called."""
    if calls:
        stream, trips = (call(address) for _ in range(2))
    else:
        with socket.create_server((address, PORT)) as server:
            stream, trips = (server.accept()[0] for _ in range(2))
    trips.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)

    # 1. Round trips of one byte. The called end sends back all that it gets on this connection.
    if calls:
        idle = [round_trip(trips) for _ in range(500)]
    else:
        threading.Thread(target=echo, args=(trips,), daemon=True).start()

    # 2. One stream to the called end. It measures, once TCP has found its speed, and tells the caller.
    warm_up = volume // 4
    if calls:
        push(stream, warm_up + volume)
        (alone,) = struct.unpack("d", stream.recv(8, socket.MSG_WAITALL))
    else:
        pull(stream, warm_up)
        stream.sendall(struct.pack("d", pull(stream, volume)))

    # 3. Another, and round trips beside it.
    if calls:
        sender = threading.Thread(target=push, args=(stream, volume))
        sender.start()
        busy = [round_trip(trips)]
        while sender.is_alive():
            busy.append(round_trip(trips))
    else:
        pull(stream, volume)

    # 4. One each way at once.
    sender = threading.Thread(target=push, args=(stream, volume))
    sender.start()
    mine = pull(stream, volume)
    sender.join()
    stream.sendall(struct.pack("d", mine))
    (theirs,) = struct.unpack("d", stream.recv(8, socket.MSG_WAITALL))
    if calls:
        medians = {"idle": statistics.median(idle), "busy": statistics.median(busy)}
        print(json.dumps({**medians, "alone": alone, "there": theirs, "back": mine}))


def round_trip(connection: socket.socket) -> float:
    start = time.perf_counter()
    connection.sendall(b"x")
    connection.recv(1)
    return time.perf_counter() - start


def echo(connection: socket.socket) -> None:
    while got := connection.recv(1):
        connection.sendall(got)


def call(address: str) -> socket.socket:
    """Connect, once the other end is listening."""
    for _ in range(100):
        try:
            return socket.create_connection((address, PORT), timeout=60)
        except ConnectionRefusedError:
            time.sleep(0.1)
    raise SystemExit(f"no one answers at {address}")


def push(connection: socket.socket, volume: int) -> None:
    block = bytes(1 << 18)
    for start in range(0, volume, len(block)):
        connection.sendall(block[: volume - start])


def pull(connection: socket.socket, volume: int) -> float:
    """Receive so many bytes; bit/s from the arrival of the first of them to that of the last."""
    block = bytearray(1 << 18)
    first = connection.recv_into(block, min(volume, len(block)))
    start = time.perf_counter()
    left = volume - first
    while left:
        got = connection.recv_into(block, min(left, len(block)))
        if not got:
            raise SystemExit("the other end has gone")
        left -= got
    return (volume - first) * 8 / (time.perf_counter() - start)


if __name__ == "__main__":
    role, address, volume = sys.argv[1:]
    one_end(role == "caller", address, int(volume))
