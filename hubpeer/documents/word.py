"""DOCX, and what else comes in a ZIP archive: the archive is checked before anything of it is unpacked.

The text is taken from the XML as it streams by; no tree is built. That finds what python-docx passes over in silence (content
controls, text boxes, insertions, notes), needs little memory, and stops where the text is long enough. python-docx reads the
properties.
Names: ECMA-376, part 1 (WordprocessingML) and part 2 (packages); "strict" documents have namespaces of their own.
"""

from __future__ import annotations

import re
import zipfile
from collections.abc import Iterator
from io import BytesIO
from typing import IO, Final

from docx.opc.coreprops import CoreProperties
from docx.oxml.coreprops import CT_CoreProperties
from docx.oxml.parser import parse_xml
from lxml import etree

from hubpeer.documents.parts import MAX_HEADINGS, Part
from hubpeer.documents.sniff import unsupported
from hubpeer.errors import DocumentRejected

MAX_ENTRIES: Final = 5000
MAX_TOTAL: Final = 100_000_000  # bytes, unpacked
MAX_ENTRY: Final = 50_000_000
#: Unpacked to packed, for entries of 1 MB and more. None of 409 real files comes near; every bomb passes it.
MAX_RATIO: Final = 200
MAX_TREE: Final = 8_000_000  # bytes of a part that is read whole: styles, properties, content types
SLICE: Final = 64 * 1024

_W: Final = ("http://schemas.openxmlformats.org/wordprocessingml/2006/main", "http://purl.oclc.org/ooxml/wordprocessingml/main")
_FALLBACK: Final = "{http://schemas.openxmlformats.org/markup-compatibility/2006}Fallback"
#: Ends of the content types of the parts with text beside the main one, in the order they are read.
_PARTS: Final = ("footnotes+xml", "endnotes+xml", "comments+xml", "header+xml", "footer+xml")


def read(data: bytes, max_chars: int) -> Iterator[Part]:
    """Raises `DocumentRejected`: `bad_docx`, `doc_too_large`, `unsupported_type` for archives of something else."""
    try:
        with zipfile.ZipFile(BytesIO(data)) as archive:
            yield from _document(_checked(archive), max_chars)
    except zipfile.BadZipFile:
        raise _bad("this archive is damaged or cut off; send the file as it was saved") from None
    except etree.XMLSyntaxError:
        raise _bad("the XML inside is damaged; save the document anew") from None


def _bad(message: str) -> DocumentRejected:
    return DocumentRejected("bad_docx", message)


def _checked(archive: zipfile.ZipFile) -> zipfile.ZipFile:
    """`archive`, if its table of contents is one that a word processor writes. Declared sizes may lie, but only so far: zipfile
    never unpacks more of an entry than the size declared for it, and then finds that its checksum is wrong."""
    entries = archive.infolist()
    if len(entries) > MAX_ENTRIES or len({entry.filename for entry in entries}) < len(entries):
        raise _bad("the archive has too many entries, or two of one name; save the document anew")
    if any(entry.flag_bits & 1 for entry in entries):
        raise _bad("the archive has encrypted entries; save the document without a password")
    if sum(entry.file_size for entry in entries) > MAX_TOTAL or any(
        entry.file_size > MAX_ENTRY or (entry.file_size > 1_000_000 and entry.file_size > MAX_RATIO * entry.compress_size)
        for entry in entries
    ):
        raise DocumentRejected("doc_too_large", "this document unpacks to more than a document may hold; split it")
    return archive


def _document(archive: zipfile.ZipFile, max_chars: int) -> Iterator[Part]:
    names = archive.namelist()
    types = _content_types(archive)
    main = next((name for name, kind in types.items() if _MAIN.search(kind)), "word/document.xml")
    if main not in names:
        raise _something_else(archive, types)
    yield Part("engine", f"lxml {etree.__version__}")
    if any("macroenabled" in kind for kind in types.values()) or any(name.endswith("vbaProject.bin") for name in names):
        yield Part("note", "macros")
    embedded = sum(name.startswith("word/embeddings/") for name in names)
    if embedded:
        yield Part("note", f"attachments:{embedded}")
    for name, kind in types.items():
        if kind.endswith("core-properties+xml") and name in names:
            yield Part("title", _title(_content(archive, name)))

    left = max_chars
    headings = _heading_styles(archive, types)
    seen = set()  # a header of every section is often one and the same
    for name in (main, *(name for end in _PARTS for name, kind in types.items() if kind.endswith(end) and name in names)):
        story = _Story(headings)
        with archive.open(name) as source:
            _parse(source, story, left)
        text = "\n".join(story.lines).strip()
        for heading in story.headings[:MAX_HEADINGS]:
            yield Part("heading", heading)
        if text and text not in seen:
            seen.add(text)
            left -= len(text)
            yield Part("text", re.sub(r"\n{3,}", "\n\n", text) + "\n\n")
        if left < 0:
            return  # the caller cuts and says so


_MAIN: Final = re.compile(r"(?:wordprocessingml|ms-word)\..*main\+xml$")


def _content_types(archive: zipfile.ZipFile) -> dict[str, str]:
    """Every part's name and content type, in lower case, as the package states them."""
    if "[Content_Types].xml" not in archive.namelist():
        return {}
    return {
        entry.get("PartName", "").lstrip("/"): entry.get("ContentType", "").lower()
        for entry in _tree(archive, "[Content_Types].xml").iter("{*}Override")
    }


def _something_else(archive: zipfile.ZipFile, types: dict[str, str]) -> DocumentRejected:
    """The error for an archive that holds no Word document."""
    kinds = " ".join(types.values())
    if "mimetype" in archive.namelist():
        with archive.open("mimetype") as source:
            kinds += source.read(100).decode("ascii", "replace")
    for mark, name in (
        ("spreadsheetml", "an Excel workbook"),
        ("ms-excel", "an Excel workbook"),
        ("presentationml", "a PowerPoint presentation"),
        ("ms-powerpoint", "a PowerPoint presentation"),
        ("opendocument", "an OpenDocument file"),
        ("epub", "an EPUB book"),
    ):
        if mark in kinds:
            return unsupported(name)
    return _bad("the document part is missing; save the document anew") if types else unsupported("a ZIP archive")


def _heading_styles(archive: zipfile.ZipFile, types: dict[str, str]) -> set[str]:
    """Ids of the styles that make a heading. The ids are in the author's language, the names are English always."""
    for name, kind in types.items():
        if kind.endswith("wordprocessingml.styles+xml") and name in archive.namelist():
            styles = _tree(archive, name).iter(*(f"{{{namespace}}}style" for namespace in _W))
            return {
                style.get(style.tag.replace("}style", "}styleId"))
                for style in styles
                for label in style.iterchildren(style.tag.replace("}style", "}name"))
                if re.match(r"(?:heading [1-3]|title)$", label.get(label.tag.replace("}name", "}val"), ""), re.IGNORECASE)
            }
    return set()


def _title(core: bytes) -> str:
    """The title among the core properties, as python-docx reads them."""
    properties = parse_xml(core)
    return str(CoreProperties(properties).title or "") if isinstance(properties, CT_CoreProperties) else ""


def _content(archive: zipfile.ZipFile, name: str) -> bytes:
    with archive.open(name) as source:
        content = source.read(MAX_TREE + 1)
    if len(content) > MAX_TREE:
        raise DocumentRejected("doc_too_large", "a part of this document is larger than any word processor writes")
    return content


def _tree(archive: zipfile.ZipFile, name: str) -> etree._Element:
    """A small part of the package as a tree."""
    root = etree.fromstring(_content(archive, name), etree.XMLParser(resolve_entities=False, no_network=True))
    if root.getroottree().docinfo.doctype:
        raise _doctype()
    return root


def _doctype() -> DocumentRejected:
    return _bad("the XML inside declares a DOCTYPE, which no word processor writes; save the document anew")


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────────


def _parse(source: IO[bytes], story: _Story, max_chars: int) -> None:
    """Feed `source` to `story`, until there are more than `max_chars` characters."""
    parser = etree.XMLParser(target=story, resolve_entities=False, no_network=True)
    while chunk := source.read(SLICE):
        parser.feed(chunk)
        if story.chars > max_chars:
            return
    parser.close()


#: The elements that matter, by their full name in either namespace. Formulas keep their text in a `t` of their own.
_NAMES: Final = {
    f"{{{namespace}}}{name}": name
    for namespace in _W
    for name in ("p", "t", "tab", "br", "cr", "noBreakHyphen", "pStyle", "tc", "tr")
} | {"{http://schemas.openxmlformats.org/officeDocument/2006/math}t": "t"}
#: Said twice (text for old readers, text moved elsewhere), or not said at all (tab stops).
_SKIPPED: Final = {_FALLBACK} | {f"{{{namespace}}}{name}" for namespace in _W for name in ("moveFrom", "tabs")}
_AS_TEXT: Final = {"tab": "\t", "br": "\n", "cr": "\n", "noBreakHyphen": "-"}


class _Story:
    """One part's text, line by line. lxml calls `doctype`, `start`, `end`, `data` and `close`.

    Paragraphs may lie inside paragraphs (text boxes) and tables inside cells, hence the stacks.
    """

    def __init__(self, headings: set[str]) -> None:
        self.lines: list[str] = []
        self.headings: list[str] = []
        self.chars = 0
        self._heading_styles = headings
        self._heading = False
        self._skipped = 0  # how deep we are in an element that is passed over
        self._reading = False  # inside a `t`
        self._paragraphs: list[list[str]] = []
        self._rows: list[list[str]] = []
        self._cells: list[list[str]] = []

    def doctype(self, *_: object) -> None:
        raise _doctype()

    def start(self, tag: str, attributes: dict[str, str]) -> None:
        if self._skipped or tag in _SKIPPED:
            self._skipped += 1
            return
        name = _NAMES.get(tag)
        if name == "t":
            self._reading = True
        elif name == "p":
            self._paragraphs.append([])
            self._heading = False
        elif name in _AS_TEXT:
            self._put(_AS_TEXT[name])
        elif name == "pStyle":
            self._heading = attributes.get(tag.replace("}pStyle", "}val")) in self._heading_styles
        elif name == "tr":
            self._rows.append([])
        elif name == "tc":
            self._cells.append([])

    def end(self, tag: str) -> None:
        if self._skipped:
            self._skipped -= 1
            return
        name = _NAMES.get(tag)
        if name == "t":
            self._reading = False
        elif name == "p":
            self._line("".join(self._paragraphs.pop()))
        elif name == "tc":
            cell = " ".join(" ".join(self._cells.pop()).split())
            if self._rows:
                self._rows[-1].append(cell)
        elif name == "tr":
            self._line("\t".join(self._rows.pop()))

    def data(self, text: str) -> None:
        if self._reading and not self._skipped:
            self._put(text)

    def close(self) -> None:
        pass

    def _put(self, text: str) -> None:
        if self._paragraphs:
            self._paragraphs[-1].append(text)
            self.chars += len(text)

    def _line(self, line: str) -> None:
        if self._heading:
            self._heading = False
            self.headings.append(line)
        (self._cells[-1] if self._cells else self.lines).append(line)
        self.chars += 1
