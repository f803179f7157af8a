"""Films as they are seen: in a terminal, in a pipe, as SVG and as GIF."""

import io
import os
import re
import select
import subprocess
import sys
import xml.etree.ElementTree as ET

import pytest

from minidist.__main__ import main
from minidist.watch import watch
from minidist.watch.terminal import Style

SVG = "{http://www.w3.org/2000/svg}"
FILMS = [
    ("ring", {}),
    ("all_to_all bruck", {"ranks": 5}),
    ("barrier tree", {"ranks": 3}),
    ("hierarchical", {}),
    ("broadcast binomial", {"ranks": 1}),
    ("zero-bubble", {"microbatches": 4}),
    ("interleaved", {"ranks": 2}),
    ("ssp:1", {"steps": 2}),
    ("backup:1", {"steps": 2}),
]
every_film = pytest.mark.parametrize("name, options", FILMS)


def seen(root: ET.Element, style: str, percent: float) -> list[str]:
    """The texts that can be seen at a moment of the loop."""
    frames = {
        name: [(float(p), int(o)) for p, o in re.findall(r"([\d.]+)%\{opacity:(\d)\}", body)]
        for name, body in re.findall(r"@keyframes (v\d+)\{((?:[^{}]*\{[^{}]*\})*)\}", style)
    }
    shown = []
    for group in root:
        name = group.get("class", "") if group.tag == f"{SVG}g" else ""
        if not name or [o for p, o in frames[name] if p <= percent][-1]:
            shown += [text.text for text in group.iter(f"{SVG}text")]
    return shown


@every_film
def test_the_svg_is_whole_refers_to_nothing_and_is_the_same_every_time(name, options, tmp_path):
    film = watch(name, **options)
    svg = film.svg(tmp_path / "film.svg")
    assert (tmp_path / "film.svg").read_bytes() == svg.encode()
    assert watch(name, **options).svg() == svg
    root = ET.fromstring(svg)
    assert root.tag == f"{SVG}svg" and root.find(f"{SVG}title").text == film.title
    assert not re.search(r"(href|url)[=(]\"?(?!#)[^\"]", svg.replace('xmlns="http://www.w3.org/2000/svg"', ""))
    assert "http" not in svg.replace("http://www.w3.org/2000/svg", "") and "<script" not in svg
    names = {element.get("id") for element in root.iter()}
    assert {use.get("href")[1:] for use in root.iter(f"{SVG}use")} <= names
    style = root.find(f"{SVG}style").text
    for rule in ("prefers-color-scheme:dark", "prefers-reduced-motion:reduce"):
        assert style.count(rule) == 1
    height = float(root.get("height"))
    for element in root.iter(
        f"{SVG}text",
    ):
        assert 0 < float(element.get("y")) < height and 0 <= float(element.get("x")) <= 760
    for element in root.iter(f"{SVG}rect"):
        assert float(element.get("width")) > 0 and float(element.get("height")) > 0


def test_each_moment_of_the_svg_shows_its_frame():
    film = watch("ring", ranks=3)
    root = ET.fromstring(film.svg())
    style = root.find(f"{SVG}style").text
    scenes = film.scenes()
    total, at = sum(scene.weight for scene in scenes), 0.0
    for number, scene in enumerate(scenes):
        shown = seen(root, style, 100 * (at + scene.weight / 2) / total)
        at += scene.weight
        frame = film.frames[scene.frame if number == 0 or scenes[number - 1].frame == scene.frame else scene.frame - 1]
        cells = ["+".join(map(str, sorted(cell))) for row in frame.state for cell in row]
        sums = [text for text in shown if re.fullmatch(r"\d(\+\d)*", text) and text not in ("0", "1", "2", "3", "4")]
        moving = number and scene.frame != scenes[number - 1].frame
        on_way = [m.contents[0] for m in film.frames[scene.frame].moves] if moving else []
        expected = cells + ["+".join(map(str, sorted(cell))) for cell in on_way]
        assert sorted(sums) == sorted(text for text in expected if "+" in text)
        assert f"{frame.time:g} s" in shown
    # What stands still is the last one.
    still = [g for g in root if g.tag == f"{SVG}g" and f".{g.get('class')}{{opacity:1" in style]
    assert any(text.text == "0+1+2" for g in still for text in g.iter(f"{SVG}text"))


@pytest.mark.parametrize("name, options", [FILMS[0], FILMS[1], FILMS[7]])
def test_the_gif_has_a_frame_for_each_scene(name, options, tmp_path):
    image = pytest.importorskip("PIL.Image")
    film = watch(name, **options)
    film.gif(tmp_path / "film.gif", seconds=0.5)
    scenes = film.scenes()
    with image.open(tmp_path / "film.gif") as picture:
        assert picture.format == "GIF" and picture.size == (760, -(-scenes[0].height // 1))
        assert picture.info["loop"] == 0
        shown = 0
        for number in range(picture.n_frames):
            picture.seek(number)
            shown += picture.info["duration"]
        assert picture.n_frames <= len(scenes)
        assert name != "ring" or picture.n_frames == len(scenes) == 13
    assert shown == pytest.approx(500 * sum(scene.weight for scene in scenes), abs=10 * len(scenes))


@every_film
@pytest.mark.parametrize("width", [30, 50, 120])
def test_text_fits_the_terminal_in_ascii_too(name, options, width):
    film = watch(name, **options)
    for i in range(len(film)):
        plain = film.text(i, Style(colour=False, ascii=True, width=width))
        assert plain.isascii()
        assert width < 50 or all(len(line) <= width for line in plain.splitlines()), plain
        painted = film.text(i, Style(colour=True, ascii=False, width=width))
        bare = [line.rstrip() for line in re.sub(r"\x1b\[[\d;]*m", "", painted).splitlines()]
        assert bare == film.text(i, Style(False, False, width)).splitlines()
    assert film.text(-1) == film.text(len(film) - 1)


def test_a_notebook_gets_an_image():
    html = watch("ring", ranks=2)._repr_html_()
    assert html.startswith('<img alt="all_reduce ring, 2 ranks" src="data:image/svg+xml;base64,')


# -- the command ------------------------------------------------------------------------------------------------------


def test_a_pipe_gets_all_frames_without_colours(capsys):
    main(["watch", "ring", "--ranks", "3"])
    out = capsys.readouterr().out
    for i in range(5):
        assert f"frame {i} of 4" in out
    assert "\x1b" not in out and "12 messages at 4 moments" in out
    assert "2 → 0   rank 2 sends chunk 1, its own, to rank 0" in out


def test_files_are_written_in_the_place_of_showing(tmp_path, capsys):
    pytest.importorskip("PIL")
    svg, gif = tmp_path / "a.svg", tmp_path / "a.gif"
    main(["watch", "broadcast", "binomial", "--ranks", "4", "--root", "1", "--svg", str(svg), "--gif", str(gif)])
    assert svg.read_text() == watch("broadcast binomial", 4, root=1).svg() and gif.read_bytes()[:6] == b"GIF89a"
    assert capsys.readouterr().out.count("broadcast binomial, 4 ranks, root 1: 3 messages") == 2


def test_names_are_listed_and_wrong_ones_told(capsys):
    main(["watch"])
    out = capsys.readouterr().out
    for words in ("recursive_halving", "zero-bubble", "ssp:S", "not mpi and shared_memory"):
        assert words in out
    for argv, why in [
        (["rign"], "there is no 'rign' to watch; did you mean 'ring'?"),
        (["bcast"], "there is no 'bcast' to watch"),
        (["ring", "--steps", "3"], "steps: to watch 'ring' there are"),
        (["ring", "--ranks", "99"], "ranks=99"),
        (["ring", "--speed", "0"], "--speed 0.0"),
    ]:
        with pytest.raises(SystemExit) as stop:
            main(["watch", *argv])
        assert str(stop.value).startswith("minidist watch: ") and why in str(stop.value)
    with pytest.raises(SystemExit) as stop:
        main(["wach"])
    assert "there is no command 'wach'" in str(stop.value) and "watch" in str(stop.value)


def test_a_stream_that_knows_ascii_only_gets_ascii(monkeypatch):
    out = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", out)
    main(["watch", "all_to_all", "bruck", "--ranks", "2"])
    out.flush()
    assert b"0->1" in out.buffer.getvalue()


@pytest.mark.skipif(not hasattr(os, "openpty"), reason="no pseudo-terminals here")
def test_keys_step_on_and_back_at_a_terminal():
    ours, theirs = os.openpty()
    command = [sys.executable, "-m", "minidist", "watch", "ring", "--ranks", "2"]
    environment = {**os.environ, "TERM": "xterm", "COLUMNS": "80", "LINES": "24"}
    environment.pop("NO_COLOR", None)
    with subprocess.Popen(command, stdin=theirs, stdout=theirs, stderr=theirs, env=environment) as process:
        os.close(theirs)
        text = ""
        for key, frame in [(b"", 0), (b"\n", 1), (b"\x1b[C", 2), (b"\x1b[D", 1), (b"q", None)]:
            os.write(ours, key)
            text = ""
            while frame is not None and "quit" not in text:
                assert select.select([ours], [], [], 20)[0], f"nothing after {key!r}"
                text += os.read(ours, 4096).decode()
            assert frame is None or f"frame {frame} of 2" in text
        assert process.wait(30) == 0
    os.close(ours)


def test_it_goes_on_by_itself_at_a_speed(monkeypatch, capsys):
    class Terminal(io.StringIO):
        encoding = "utf-8"

        def isatty(self):
            return True

    out = Terminal()
    monkeypatch.setattr(sys, "stdout", out)
    monkeypatch.setenv("NO_COLOR", "1")
    main(["watch", "ring", "--ranks", "2", "--speed", "1000"])
    shown = out.getvalue().split("\x1b[2J\x1b[H")
    assert [re.search(r"frame (\d)", part)[1] for part in shown[1:]] == ["0", "1", "2"]
    assert "\x1b[30" not in out.getvalue()
