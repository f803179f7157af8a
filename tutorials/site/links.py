"""Every link of a built site that stays within it leads somewhere, anchors too, and nothing is fetched from elsewhere.

External links are not followed: the check works offline, and gives the same answer every day.
"""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit

POINTERS = {
    "a": "href",
    "link": "href",
    "img": "src",
    "script": "src",
    "source": "src",
    "iframe": "src",
    "object": "data",
}
FOLLOWED = {"a"}  # by a click: these may lead elsewhere; all others are fetched with the page
RELATIONS = {"canonical", "author", "license"}  # of <link>: not fetched


class Page(HTMLParser):
    """The anchors of a page, and what it points to: (element, address)."""

    def __init__(self, text: str):
        super().__init__()
        self.anchors: set[str] = set()
        self.pointers: list[tuple[str, str]] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        self.anchors.update(filter(None, (values.get("id"), values.get("name") if tag == "a" else None)))
        address = values.get(POINTERS.get(tag, ""))
        if address and not (tag == "link" and values.get("rel") in RELATIONS):
            self.pointers.append((tag, address))


def broken(site: Path) -> list[str]:
    """ "page: what is wrong" for every pointer of the site's pages that leads nowhere."""
    pages = {path: Page(path.read_text("utf-8")) for path in sorted(site.rglob("*.html"))}
    found = []
    for path, page in pages.items():
        for tag, address in dict.fromkeys(page.pointers):
            if why := _wrong(site, path, tag, address, pages):
                found.append(f"{path.relative_to(site)}: <{tag}> {address}: {why}")
    return found


def _wrong(site: Path, path: Path, tag: str, address: str, pages: dict[Path, Page]) -> str:
    parts = urlsplit(address)
    if parts.scheme == "data" or parts.scheme in ("mailto",):
        return ""
    if parts.scheme or parts.netloc:
        return "" if tag in FOLLOWED else "is fetched from elsewhere, so that the page is not whole offline"
    if parts.path.startswith("/"):
        return "an address from the root works only where the site is the root"
    target = path if not parts.path else (path.parent / unquote(parts.path)).resolve()
    if target.is_dir():
        target /= "index.html"
    if not target.is_file() or not target.is_relative_to(site):
        return "no such file"
    anchor = unquote(parts.fragment)
    if anchor and anchor not in ("top", ":~:text") and target in pages and anchor not in pages[target].anchors:
        return "no such anchor on that page"
    return ""
