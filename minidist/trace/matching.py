"""What belongs together in the files of several ranks: the two ends of a message, the calls of a collective."""

from __future__ import annotations

from collections import defaultdict

import numpy as np

from .tables import MESSAGES, NONE, Collective, Messages, Rank

Key = tuple[int, int, str, int]  # sender, receiver, group, tag
Ends = dict[Key, list[tuple[int, int, int, int]]]  # start, end, bytes, place in the rank's `wire`


def match_messages(ranks: list[Rank], notes: list[str]) -> Messages:
    """The k-th message that is sent with a key is the k-th that is received with it: messages do not overtake."""
    # 1. All that was sent and wanted with each key, in the order in which it was begun.
    sends: Ends = defaultdict(list)
    receives: Ends = defaultdict(list)
    for rank in ranks:
        wire = rank.wire
        order = np.argsort(wire.start, kind="stable").tolist()
        rows = list(wire)
        for i in order:
            direction, group, peer, tag, nbytes, start, end = rows[i]
            if direction == "s":
                sends[rank.number, peer, group, tag].append((start, end, nbytes, i))
            else:
                receives[peer, rank.number, group, tag].append((start, end, nbytes, i))
    # 2. In pairs. What never finished has no other end, or one that is not known.
    pairs = [
        (*key, nbytes, sent, arrived if sent_end == NONE else sent_end, posted, arrived, send, receive)
        for key, there in sends.items()
        for (sent, sent_end, nbytes, send), (posted, arrived, _, receive) in zip(there, receives.get(key, ()))
        if arrived != NONE
    ]
    alone = sum(map(len, sends.values())) - len(pairs), sum(map(len, receives.values())) - len(pairs)
    for count, what in zip(alone, ("sent that the trace shows nobody receive", "waited for that did not come")):
        if count:
            notes.append(f"{count:,} messages were {what}")
    pairs.sort(key=lambda pair: pair[5])
    return Messages.of([["", *pair] for pair in pairs])


def match_collectives(ranks: list[Rank], notes: list[str]) -> list[Collective]:
    """The k-th collective in a group on one of its ranks is the k-th on all, in the order of their last calls."""
    # 1. The collectives of each group on each of its ranks, in the order in which they were called.
    called: dict[str, dict[int, list[int]]] = defaultdict(dict)
    for rank in ranks:
        operations = rank.operations
        for i in np.argsort(operations.number, kind="stable").tolist():
            if operations.kind[i] not in MESSAGES:
                called[operations.group[i]].setdefault(rank.number, []).append(i)
    # 2. The k-th of each.
    found, different, unequal = [], [], 0
    for group, calls in called.items():
        members = ranks[min(calls)].groups[group]
        counts = [len(calls.get(member, ())) for member in members]
        unequal += max(counts) - min(counts)
        for k in range(max(counts)):
            here = {member: calls[member][k] for member in members if k < len(calls.get(member, ()))}
            entered = max(int(ranks[member].operations.start[i]) for member, i in here.items())
            kinds = {ranks[member].operations.kind[i]: member for member, i in here.items()}
            kind = next(iter(kinds))
            found.append(Collective(group, kind, here, entered, len(here) == len(members)))
            if len(kinds) > 1:
                different.append((entered, k + 1, group, kinds))
    if unequal:
        notes.append(f"{unequal:,} collectives were not called by all ranks of their group")
    if different:
        _, k, group, kinds = min(different, key=lambda one: one[0])
        words = ", ".join(f"{kind} on rank {member}" for kind, member in kinds.items())
        notes.append(f"collective {k} of group {group} differs between ranks: {words} (and {len(different) - 1} more)")
    return sorted(found, key=lambda collective: collective.entered)
