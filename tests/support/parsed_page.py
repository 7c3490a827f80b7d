"""The page of a report, taken apart."""

import re
from html.parser import HTMLParser
from pathlib import Path


class Parsed(HTMLParser):
    """What a page consists of: links, images, text and tables, by section."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.links: list[str] = []
        self.alts: dict[str, list[str]] = {}
        self.text: dict[str, str] = {}
        self.tags: set[str] = set()
        self.cells: dict[str, list[list[str]]] = {}
        self._section = ""
        self.feed(path.read_text())

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        given = dict(attributes)
        self.tags.add(tag)
        self.links += [given[key] or "" for key in ("src", "href", "srcset") if key in given]
        if tag == "section":
            self._section = given["id"] or ""
        if tag == "img":
            self.alts.setdefault(self._section, []).append(given["alt"] or "")
        if tag == "tr":
            self.cells.setdefault(self._section, []).append([])
        if tag in {"td", "th"}:
            self.cells[self._section][-1].append("")

    def handle_data(self, data: str) -> None:
        self.text[self._section] = self.text.get(self._section, "") + data
        rows = self.cells.get(self._section)
        if rows and rows[-1] and data.strip():
            rows[-1][-1] += data


def samples(alts: list[str]) -> list[int]:
    """Return the sample ids that the alt texts name."""
    return [int(re.findall(r": sample (\d+), ", alt)[-1]) for alt in alts]
