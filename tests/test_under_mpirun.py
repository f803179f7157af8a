"""Plain pytest runs the bodies of all on_ranks tests once more, on four real ranks.

In two jobs: MPICH has 2,048 communicators for one, and none that a test has made is given back.
"""

from __future__ import annotations

from pathlib import Path

import pytest
from launch import needs_mpi, run_ranks


@needs_mpi
@pytest.mark.parametrize("servers", [False, True])
def test_the_rank_tests_pass_under_mpirun(servers: bool) -> None:
    paths = [path for path in sorted(Path(__file__).parent.glob("test_*.py")) if "@on_ranks(" in path.read_text()]
    files = [str(path) for path in paths if path.name.startswith("test_ps_") == servers]
    done = run_ranks(4, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "ranks", *files, deadline=600)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout  # by rank 0, which reports for all
    assert done.stdout.count(" passed") == 1
