"""The helpers of the tutorials."""

import numpy as np

import minidist as md
from minidist import lessons


@lessons.exercise
def check_double(answer):
    """Twice as much."""
    assert answer(3) == 6, "twice 3 is 6"
    assert answer(0) == 0


def test_a_right_answer_is_right(capsys):
    assert check_double(lambda x: 2 * x)
    assert capsys.readouterr().out == "right\n"
    assert (check_double.__name__, check_double.__doc__) == ("check_double", "Twice as much.")


def test_a_wrong_answer_hears_why(capsys):
    assert not check_double(lambda x: x)
    assert not check_double(lambda x: 6)
    assert not check_double(lambda x: x.nothing)
    assert not check_double(None)
    told = capsys.readouterr().out.splitlines()
    assert told[0] == "not yet: twice 3 is 6"
    assert "AttributeError" in "\n".join(told) and "TypeError" in told[-1]


def test_the_source_is_that_of_the_package(capsys):
    lessons.source(md.collectives.all_reduce, 1, 3)
    assert capsys.readouterr().out.splitlines()[:2] == ["@refused_on_all", "def all_reduce("]


def test_the_error_of_a_simulation_is_told_without_folders():
    def program(comm):
        if comm.rank == 0:
            md.collectives.barrier(comm)

    error = lessons.error_of(program, 2)
    assert isinstance(error, md.comm.Deadlock)
    assert "rank 0 waits for rank 1, which has finished" in lessons.told(error)
    assert "at minidist/collectives/" in lessons.told(error)
    assert lessons.error_of(lambda comm: comm.sendrecv(np.ones(1), 0, np.ones(1), 0), 1) is None
    assert lessons.told(None) == "no error"


def test_lines_of_a_notebook_are_told_as_lines_of_a_cell():
    error = ValueError("at /tmp/ipykernel_12/345.py:6 in step, called from C:\\me\\ipykernel_1\\2.py:9 in <module>")
    words = "at line 6 of the cell in step, called from line 9 of the cell in <module>"
    assert lessons.told(error) == f"ValueError: {words}"
    assert lessons.told(OSError("/lib/minidist/comm/mpi.py:3")) == "OSError: minidist/comm/mpi.py:3"
