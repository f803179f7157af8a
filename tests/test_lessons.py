"""The helpers of the tutorials."""

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
