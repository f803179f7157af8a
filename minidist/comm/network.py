"""What messages cost on simulated ranks: a `Network` in figures, and the `Traffic` of one run on it.

    network = Network(alpha=1e-6, beta=1e-10, ranks_per_host=8, between=Link(alpha=2e-5, beta=8e-10))
    simulate(program, 64, network=network).seconds

The model is that of the papers on collectives: a message of n bytes takes alpha + n beta seconds, and combining n
bytes with n others takes n gamma. A rank has a port out and a port in, so that it can send to one rank and receive
from another at the same time. No byte is slowed down by another, except where it waits for a port.

Sources  Hockney 1994, "The communication challenge for MPP" (alpha, beta)
         Chan, Heimlich, Purkayastha & van de Geijn 2007, "Collective communication: theory, practice, and experience"
         Thakur, Rabenseifner & Gropp 2005, "Optimization of collective communication operations in MPICH" (the ports)
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

Ports = Literal["one", "many"]
Sends = Literal["eager", "rendezvous"]


@dataclass(frozen=True)
class Link:
    """A message of n bytes takes alpha + n beta seconds."""

    alpha: float = 0.0  # seconds a message
    beta: float = 0.0  # seconds a byte

    def __post_init__(self) -> None:
        _check_seconds(self, "alpha", "beta")


@dataclass(frozen=True)
class Network:
    """What a simulated run costs. Without figures everything is free, and only the order of events is left.

    A message that a rank sends to itself costs as any other within its host.

    One port    A message holds the sender's port out and the receiver's port in from its start to its arrival. It
                starts as soon as both are free. Ports are given in the order of the sends, and a gap is never filled
                by a later one: a message that waits for its receiver's port makes those behind it wait as well.
    Many ports  Ranks' ports are never held: every message starts at once.
    Hosts       Between hosts the figures are those of `between`. All ranks of a host share its one link to the others,
                which is a port as well, out and in, whatever `ports` says: a message needs both hosts' links, and
                holds them for n beta seconds from its start. (None: as within a host, without links to share.)
    Eager       A send copies its array and is done at once; a receive is done when the message has arrived.
    Rendezvous  A message starts no sooner than its receive has been posted; the send is done when it has arrived.

    Errors  ValueError: a negative cost, an unknown word, hosts given twice or without need
    """

    alpha: float = 0.0  # seconds a message
    beta: float = 0.0  # seconds a byte
    gamma: float = 0.0  # seconds a byte that is combined with another
    hosts: Sequence[int] | None = None  # the host of each rank, say (0, 0, 1, 1)
    ranks_per_host: int | None = None  # or: so many ranks on each host, the first ones on the first. Neither: one host
    between: Link | None = None  # the figures between hosts
    ports: Ports = "one"
    sends: Sends = "eager"
    segment: float = math.inf  # bytes; `Communicator.segment` of the simulated ranks

    def __post_init__(self) -> None:
        _check_seconds(self, "alpha", "beta", "gamma")
        for name, words in (("ports", get_args(Ports)), ("sends", get_args(Sends))):
            if getattr(self, name) not in words:
                raise ValueError(f"{name}={getattr(self, name)!r}: choose {' or '.join(map(repr, words))}")
        if not self.segment > 0:
            raise ValueError(f"segment={self.segment!r}: expected bytes above 0 (math.inf: messages are never cut)")
        if not isinstance(self.between, Link | None):
            raise ValueError(f"between={self.between!r}: expected a Link")
        if self.hosts is not None and self.ranks_per_host is not None:
            raise ValueError(f"hosts={self.hosts} and ranks_per_host={self.ranks_per_host}: give one of them")
        if self.between is not None and self.hosts is None and self.ranks_per_host is None:
            raise ValueError(f"between={self.between}: say which ranks share a host, by hosts or ranks_per_host")
        if self.ranks_per_host is not None and operator.index(self.ranks_per_host) < 1:
            raise ValueError(f"ranks_per_host={self.ranks_per_host}: expected at least 1")
        if self.hosts is not None:
            hosts = tuple(operator.index(host) for host in self.hosts)
            if min(hosts, default=0) < 0:
                raise ValueError(f"hosts={hosts}: hosts are numbered from 0 up")
            object.__setattr__(self, "hosts", hosts)

    def hosts_of(self, size: int) -> list[int]:
        """The host of each of `size` ranks."""
        if self.hosts is not None:
            if len(self.hosts) != size:
                raise ValueError(f"hosts={self.hosts} names the hosts of {len(self.hosts)} ranks; there are {size}")
            return list(self.hosts)
        return [rank // (self.ranks_per_host or size) for rank in range(size)]


class Traffic:
    """One run's messages on a network of `size` ranks: when each arrives, and until when each port is held."""

    def __init__(self, network: Network, size: int):
        self.within = Link(network.alpha, network.beta)
        self.between = network.between
        self.hosts = network.hosts_of(size)
        self.one_port = network.ports == "one"
        self.free = not any((network.alpha, network.beta, network.between))
        # The time from which on each is free, in virtual seconds:
        self._out, self._in = [0.0] * size, [0.0] * size  # a rank's ports
        links = max(self.hosts) + 1
        self._link_out, self._link_in = [0.0] * links, [0.0] * links  # a host's

    def carry(self, now: float, source: int, dest: int, nbytes: int) -> float:
        """A message is ready `now`: give it its ports, and return the time at which it arrives."""
        if self.free:
            return now
        link, start = self.within, now
        if self.one_port:
            start = max(start, self._out[source], self._in[dest])
        if self.between is not None and (here := self.hosts[source]) != (there := self.hosts[dest]):
            link = self.between
            start = max(start, self._link_out[here], self._link_in[there])
            self._link_out[here] = self._link_in[there] = start + nbytes * link.beta
        arrival = start + (link.alpha + nbytes * link.beta)
        if self.one_port:
            self._out[source] = self._in[dest] = arrival
        return arrival


def _check_seconds(figures: Any, *names: str) -> None:
    for name in names:
        value = getattr(figures, name)
        try:
            valid = 0 <= value < math.inf
        except TypeError:
            valid = False
        if not valid:
            raise ValueError(f"{name}={value!r}: expected a number of seconds, 0 or more")
