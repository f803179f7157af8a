"""Loss scaling with several ranks: an overflow on one is an overflow for all."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from ..collectives import all_reduce
from ..comm import Communicator


def any_rank(comm: Communicator) -> Callable[[bool], bool]:
    """For optim.GradScaler(agree=any_rank(comm)): whether any rank has found an overflow. Every rank calls it.

    `comm` must reach all ranks that train one model: where the gradients are sharded, or the model is split over ranks,
    only one may see an infinite number; if it skipped the step alone, the model would fall apart.

    Cost  an all-reduce of one number
    """

    def agree(here: bool) -> bool:
        with comm.step("D.3(4) agree on overflow"):
            return bool(all_reduce(comm, np.array([here], np.int64), "max")[0])

    return agree
