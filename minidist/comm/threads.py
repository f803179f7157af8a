"""BLAS threads: ranks on one host share its cores instead of each taking all of them."""

from __future__ import annotations

import os

USER_CHOICES = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")


def cores() -> int:
    """Cores this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def share_cores(ranks_on_host: int) -> None:
    """Limit BLAS to this rank's share of the cores, unless the user has set a number of threads."""
    _limit(max(1, cores() // ranks_on_host))


def one_core() -> None:
    """Limit BLAS to one core, unless the user has set a number: sums may depend on how many share them."""
    _limit(1)


def _limit(threads: int) -> None:
    if any(os.environ.get(name) for name in USER_CHOICES):
        return
    from threadpoolctl import threadpool_limits

    threadpool_limits(threads, user_api="blas")
