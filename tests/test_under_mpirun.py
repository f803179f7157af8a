"""Plain pytest runs the bodies of all on_ranks tests once more, on four real ranks."""

from __future__ import annotations

from pathlib import Path

from launch import needs_mpi, run_ranks


@needs_mpi
def test_the_rank_tests_pass_under_mpirun():
    files = [str(path) for path in sorted(Path(__file__).parent.glob("test_*.py")) if "@on_ranks(" in path.read_text()]
    done = run_ranks(4, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "ranks", *files, deadline=300)
    assert done.returncode == 0, f"\n{done.stdout}\n{done.stderr}"
    assert " passed" in done.stdout  # by rank 0, which reports for all
    assert done.stdout.count(" passed") == 1
