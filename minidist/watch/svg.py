"""Scenes as one animated SVG: CSS only, no script, nothing from elsewhere.

A shape that stands in several scenes is written once. When it is seen is a @keyframes rule, one for each set of scenes
that occurs; shapes that are always seen need none. Without animation (a reader who wants less motion, a program that
draws still pictures) what belongs to the last scene is seen.
"""

from __future__ import annotations

from html import escape

from .colours import DARK, LIGHT, SHARED
from .scene import WIDTH, Line, Rect, Scene, Shape, Sliding, Strip, depth

FONT = "ui-monospace,SFMono-Regular,Menlo,Consolas,'DejaVu Sans Mono',monospace"
ARRIVES = 0.75  # of a scene's time, in which what slides has arrived


def animated(scenes: list[Scene], title: str, description: str, seconds: float) -> str:
    """The whole file; `seconds` is how long a scene of weight 1 stands."""
    if not seconds > 0:
        raise ValueError(f"seconds={seconds}: expected a time above 0")
    # 1. In which scenes is each shape seen?
    seen: dict[Shape | tuple[int, Sliding], list[int]] = {}
    for number, scene in enumerate(scenes):
        for shape in scene.shapes:
            seen.setdefault((number, shape) if isinstance(shape, Sliding) else shape, []).append(number)
    starts = [0.0]
    for scene in scenes:
        starts.append(starts[-1] + scene.weight)
    ends = [100 * start / starts[-1] for start in starts]  # per cent
    # 2. A rule for each set of scenes, and for each scene in which something slides.
    names: dict[tuple[int, ...], str] = {}
    sliding: dict[int, None] = {}
    strips: dict[tuple[float, float, tuple[str, ...]], str] = {}
    body = []
    for key, numbers in sorted(seen.items(), key=_depth):
        if len(numbers) == len(scenes):
            css = ""
        else:
            css = names.setdefault(tuple(numbers), f"v{len(names)}")
        if isinstance(key, tuple):
            number, slide = key
            sliding[number] = None
            inner = "".join(_shape(shape, strips) for shape in slide.shapes)
            offset = f"--x:{_n(slide.dx)}px;--y:{_n(slide.dy)}px"
            markup = f'<g class="m{number}" style="{offset}">{inner}</g>'
        else:
            markup = _shape(key, strips)
        body.append((css, markup))
    # 3. Neighbours that are seen together stand in one group.
    groups: list[tuple[str, list[str]]] = []
    for css, markup in body:
        if not groups or groups[-1][0] != css:
            groups.append((css, []))
        groups[-1][1].append(markup)
    lines = [f'<g class="{css}">{"".join(parts)}</g>' if css else "".join(parts) for css, parts in groups]
    style = _style(names, sliding, ends, starts[-1] * seconds, len(scenes))
    height = _n(scenes[0].height)
    return "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
            ' role="img" aria-labelledby="t d">',
            f'<title id="t">{escape(title)}</title>',
            f'<desc id="d">{escape(description)}</desc>',
            f"<style>{style}</style>",
            '<defs><marker id="a" viewBox="0 0 8 8" refX="7" refY="4" markerWidth="5" markerHeight="5" orient="auto">'
            '<path d="M0 0 8 4 0 8z" fill="context-stroke"/></marker>',
            *strips.values(),
            "</defs>",
            f'<rect class="f-paper" width="{WIDTH}" height="{height}" rx="8"/>',
            *lines,
            "</svg>\n",
        ]
    )


def _depth(item: tuple[Shape | tuple[int, Sliding], list[int]]) -> int:
    key = item[0]
    return depth(key[1] if isinstance(key, tuple) else key)


def _style(
    names: dict[tuple[int, ...], str], sliding: dict[int, None], ends: list[float], total: float, scenes: int
) -> str:
    rules = [":root{" + "".join(f"--{name}:{value};" for name, value in (LIGHT | SHARED).items()) + "}"]
    changed = {name: value for name, value in DARK.items() if LIGHT[name] != value}
    rules.append(
        "@media(prefers-color-scheme:dark){:root{"
        + "".join(f"--{name}:{value};" for name, value in changed.items())
        + "}}"
    )
    rules.append(f"text{{font-family:{FONT};dominant-baseline:central}}")
    rules += [f".f-{name}{{fill:var(--{name})}}.s-{name}{{stroke:var(--{name})}}" for name in LIGHT | SHARED]
    for numbers, name in names.items():
        rules.append(f".{name}{{opacity:{int(scenes - 1 in numbers)};animation:{name} {_n(total)}s step-end infinite}}")
        rules.append(f"@keyframes {name}{{{_seen_in(numbers, ends, scenes)}}}")
    for number in sliding:
        start = ends[number]
        stop = start + ARRIVES * (ends[number + 1] - start)
        begin = f"0%,{_n(start)}%" if start else "0%"
        rules.append(f".m{number}{{animation:m{number} {_n(total)}s ease-in-out infinite}}")
        rules.append(
            f"@keyframes m{number}{{{begin}{{transform:translate(var(--x),var(--y))}}"
            f"{_n(stop)}%,100%{{transform:none}}}}"
        )
    rules.append("@media(prefers-reduced-motion:reduce){*{animation:none!important}}")
    return "".join(rules)


def _seen_in(numbers: tuple[int, ...], ends: list[float], scenes: int) -> str:
    """The keyframes: a value holds until the next one."""
    frames = []
    before = None
    for number in range(scenes):
        now = int(number in numbers)
        if now != before:
            frames.append(f"{_n(ends[number])}%{{opacity:{now}}}")
            before = now
    return "".join(frames) + f"100%{{opacity:{before}}}"


def _shape(shape: Shape, strips: dict[tuple[float, float, tuple[str, ...]], str]) -> str:
    """The markup. A strip is written once for all that are alike, among `strips`."""
    if isinstance(shape, Strip):
        key = shape.w, shape.h, shape.fills
        if key not in strips:
            strips[key] = f'<g id="p{len(strips)}">{"".join(_shape(piece, strips) for piece in shape.pieces())}</g>'
        name = strips[key].split('"')[1]
        return f'<use href="#{name}" x="{_n(shape.x)}" y="{_n(shape.y)}"/>'
    if isinstance(shape, Rect):
        css = [f"f-{shape.fill}"] if shape.fill else []
        css += [f"s-{shape.stroke}"] if shape.stroke else []
        extra = "" if shape.fill else ' fill="none"'
        extra += f' rx="{_n(shape.round)}"' if shape.round else ""
        extra += f' fill-opacity="{_n(shape.opacity)}"' if shape.opacity != 1 else ""
        extra += ' stroke-dasharray="3 3"' if shape.dashed else ""
        place = f'x="{_n(shape.x)}" y="{_n(shape.y)}" width="{_n(shape.w)}" height="{_n(shape.h)}"'
        return f'<rect class="{" ".join(css)}" {place}{extra}/>'
    if isinstance(shape, Line):
        extra = ' marker-end="url(#a)"' if shape.arrow else ""
        extra += ' stroke-dasharray="3 3"' if shape.dashed else ""
        place = f'x1="{_n(shape.x1)}" y1="{_n(shape.y1)}" x2="{_n(shape.x2)}" y2="{_n(shape.y2)}"'
        return f'<line class="s-{shape.stroke}" {place} stroke-width="{_n(shape.width)}"{extra}/>'
    extra = f' text-anchor="{shape.anchor}"' if shape.anchor != "start" else ""
    extra += ' font-weight="700"' if shape.bold else ""
    words = escape(shape.text, quote=False)
    return (
        f'<text class="f-{shape.fill}" x="{_n(shape.x)}" y="{_n(shape.y)}" font-size="{_n(shape.size)}"{extra}'
        f' xml:space="preserve">{words}</text>'
    )


def _n(number: float) -> str:
    """A number with at most two decimals, and no zeros behind them."""
    return f"{number:.2f}".rstrip("0").rstrip(".") if number % 1 else str(int(number))
