"""Every kind of document to its reader: bytes in, parts out as they come. Pure; runs in a child process.

PDF and DOCX have files of their own, `pdf.py` and `word.py`; here are the text formats.
"""

from __future__ import annotations

import csv
import email
import email.policy
import io
import json
import re
from collections.abc import Iterable, Iterator
from email.message import MIMEPart
from itertools import chain, islice
from typing import Any, Final

from lxml import etree

from hubpeer.documents import pdf, word
from hubpeer.documents.parts import CSV, DOCX, EMAIL, HTML, JSON, MARKDOWN, MAX_HEADINGS, PDF, Part, Task, clean, rejected
from hubpeer.documents.sniff import MAX_JSON, delimiter, sniff
from hubpeer.errors import DocumentRejected

#: Characters in one frame: small enough that the hub's event loop turns between two of them.
SLICE: Final = 64 * 1024
MAX_ROWS: Final = 100_000
MAX_DEPTH: Final = 64  # of JSON


def read(data: bytes, task: Task) -> Iterator[Part]:
    """What is in `data`. Raises `DocumentRejected`, perhaps after some parts; whatever else goes wrong becomes one."""
    broken = "bad_document"
    left = task.max_chars
    try:
        kind = sniff(data, task.filename, task.declared)
        broken = {PDF: "bad_pdf", DOCX: "bad_docx"}.get(kind.media_type, broken)
        yield Part("type", kind.media_type)
        for note in kind.notes:
            yield Part("note", note)
        for part in _parts(kind.media_type, data, kind.text, task):
            if part.kind not in ("page", "text"):
                yield part
                continue
            text = clean(part.text)
            yield Part(part.kind, text[: min(SLICE, left)])
            for at in range(SLICE, min(len(text), left), SLICE):
                yield Part("text", text[at : min(at + SLICE, left)])
            left -= len(text)
            if left < 0:
                yield Part("note", "truncated")
                return
    except DocumentRejected:
        raise
    except MemoryError:
        raise rejected("extraction_memory") from None
    except RecursionError:
        raise DocumentRejected(broken, "this document is nested too deep to be read") from None
    except Exception:
        # Readers meet what their authors never saw: TypeError, KeyError, struct.error. The document is at fault, and the
        # text of such an exception helps nobody who sends one.
        raise DocumentRejected(broken, "this document is damaged; save it anew") from None


def _parts(media_type: str, data: bytes, text: str, task: Task) -> Iterator[Part]:
    if media_type == PDF:
        return pdf.read(data, task.max_pages, task.pdf_engine)
    if media_type == DOCX:
        return word.read(data, task.max_chars)
    if media_type == EMAIL:
        return _email(data)
    if media_type == HTML:
        return _html(text)
    if media_type == MARKDOWN:
        return _markdown(text)
    if media_type == CSV:
        return _csv(text)
    if media_type == JSON:
        return _json(text)
    return _plain(text)


def _stretches(lines: Iterable[str]) -> Iterator[Part]:
    """Lines as parts of a sensible size."""
    held: list[str] = []
    size = 0
    for line in lines:
        held.append(line)
        size += len(line)
        if size >= SLICE:
            yield Part("text", "".join(held))
            held, size = [], 0
    yield Part("text", "".join(held))


def _plain(text: str, engine: str = "text") -> Iterator[Part]:
    yield Part("engine", engine)
    text = text.replace("\r\n", "\n")  # before the cut below can fall between the two
    for at in range(0, len(text), SLICE):
        yield Part("text", text[at : at + SLICE])


_ATX: Final = re.compile(r"^(?:(#{1,3})[ \t]+(\S[^\n]*)|(?:```|~~~))", re.MULTILINE)


def _markdown(text: str) -> Iterator[Part]:
    fenced = titled = False
    for found in islice(_ATX.finditer(text[:MAX_JSON]), 1000):
        if found[1] is None:
            fenced = not fenced
        elif not fenced:
            heading = found[2].rstrip(" \t\r#")
            if found[1] == "#" and not titled:
                titled = True
                yield Part("title", heading)
            yield Part("heading", heading)
    yield from _plain(text, "markdown")


def _csv(text: str) -> Iterator[Part]:
    """Rows of cells with tabs between them, whatever was between them before."""
    yield Part("engine", "csv")
    separator = delimiter(text) or ("\t" if "\t" in text[:SLICE] else ",")
    rows = ([" ".join(cell.split()) for cell in row] for row in csv.reader(io.StringIO(text, newline=""), delimiter=separator))
    first = next(rows, [])
    for cell in first:
        yield Part("heading", cell)
    try:
        yield from _stretches("\t".join(row) + "\n" for row in chain([first], islice(rows, MAX_ROWS - 1)))
        if next(rows, None) is not None:
            yield Part("note", "truncated")
    except csv.Error:  # a cell that never ends
        yield Part("note", "truncated")


def _json(text: str) -> Iterator[Part]:
    """An outline of names and values: what a person, a search and a model want of it, without the quotes and braces."""
    yield Part("engine", "json")
    value = json.loads(text)
    if isinstance(value, dict):
        for name in islice(value, MAX_HEADINGS):
            yield Part("heading", name)
    yield from _stretches(_outline(value, 0))


def _outline(value: dict[str, Any] | list[Any], depth: int) -> Iterator[str]:
    if depth > MAX_DEPTH:
        raise RecursionError
    indent = "  " * depth
    for name, item in value.items() if isinstance(value, dict) else (("-", item) for item in value):
        label = f"{indent}{name}:" if isinstance(value, dict) else f"{indent}-"
        if isinstance(item, dict | list):
            yield f"{label}\n"
            yield from _outline(item, depth + 1)
        else:
            yield f"{label} {item if isinstance(item, str) else json.dumps(item)}\n"


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

_HIDDEN: Final = frozenset(("script", "style", "noscript", "template", "svg", "math", "iframe", "object", "head", "select"))
_INLINE: Final = frozenset(
    "a abbr acronym b bdi bdo big cite code data del dfn em font i img ins kbd label mark q rp rt ruby s samp small span strike"
    " strong sub sup time tt u var wbr".split()
)
_HEADINGS: Final = frozenset(("h1", "h2", "h3"))


class _Page:
    """Gathers a page's text while lxml parses it; no tree is ever built. lxml calls `start`, `end`, `data` and `close`."""

    def __init__(self) -> None:
        self.facts: list[Part] = []
        self.text: list[str] = []
        self._last = "\n"  # the character before; white space after white space is dropped
        self._hidden = 0
        self._verbatim = 0
        self._cells = 0  # of the table row so far
        self._line: list[str] | None = None  # the title or heading being read

    def start(self, tag: str, attributes: object) -> None:
        if tag in _HIDDEN:
            self._hidden += 1
            if tag == "script":
                self.facts.append(Part("note", "active_content"))
        elif tag == "title" or tag in _HEADINGS:
            self._break()
            self._line = []
        elif tag in ("td", "th"):
            if self._cells:
                self._put("\t")
            self._cells += 1
        elif tag not in _INLINE:
            self._break()
            self._verbatim += tag == "pre"
            if tag == "tr":
                self._cells = 0
            elif tag == "li":
                self._put("- ")

    def end(self, tag: str) -> None:
        if tag in _HIDDEN:
            self._hidden -= 1
        elif tag == "title" or tag in _HEADINGS:
            if self._line:
                self.facts.append(Part("title" if tag == "title" else "heading", "".join(self._line)))
            self._line = None
            self._break()
        elif tag not in _INLINE and tag not in ("td", "th", "br"):
            self._break()
            self._verbatim -= tag == "pre"

    def data(self, text: str) -> None:
        if self._line is not None:
            self._line.append(text)
        if self._hidden:
            return
        if not self._verbatim:
            text = re.sub(r"\s+", " ", text)
            if self._last in " \t\n":
                text = text.lstrip(" ")
        self._put(text)

    def close(self) -> None:
        self._break()

    def _break(self) -> None:
        if self._last != "\n" and not self._hidden:
            self._put("\n")

    def _put(self, text: str) -> None:
        if text and not self._hidden:
            self.text.append(text)
            self._last = text[-1]

    def taken(self) -> Iterator[Part]:
        """What has come since the last call."""
        yield from self.facts
        yield Part("text", "".join(self.text))
        self.facts.clear()
        self.text.clear()


def _html(text: str) -> Iterator[Part]:
    yield Part("engine", f"lxml {etree.__version__}")
    page = _Page()
    parser = etree.HTMLParser(target=page, no_network=True)
    for at in range(0, len(text), SLICE):
        parser.feed(text[at : at + SLICE])
        yield from page.taken()
    parser.close()
    yield from page.taken()


# ── e-mail ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _email(data: bytes) -> Iterator[Part]:
    """Who wrote what to whom, and the best body; attachments are counted, not read."""
    yield Part("engine", "email")
    message = email.message_from_bytes(data, policy=email.policy.default)
    yield Part("title", str(message["subject"] or ""))
    for name in ("Subject", "From", "To", "Cc", "Date"):
        if message[name]:
            yield Part("text", f"{name}: {' '.join(str(message[name]).split())}\n")
    yield Part("text", "\n")
    attachments = sum(1 for _ in message.iter_attachments())
    if attachments:
        yield Part("note", f"attachments:{attachments}")
    body = message.get_body(("plain", "html"))
    if body is not None:
        yield from _body(body)


def _body(body: MIMEPart) -> Iterator[Part]:
    try:
        text = body.get_content()
    except (LookupError, UnicodeError):  # an encoding that nobody knows
        text = bytes(body.get_payload(decode=True) or b"").decode("cp1252", "replace")
    parts = _html(text) if body.get_content_subtype() == "html" else _plain(text)
    yield from (part for part in parts if part.kind in ("text", "note", "heading"))
