"""What kind of document some bytes are, by looking at them.

A name or a declared content type is a hint: it decides between text formats that look alike, and names the error for bytes
that are nothing we know. Where it says something else than the content, that is noted and the content wins.
"""

from __future__ import annotations

import csv
import json
import re
from typing import Final, NamedTuple

from hubpeer.documents.parts import CSV, DOCX, EMAIL, HTML, JSON, MARKDOWN, PDF, TEXT
from hubpeer.errors import DocumentRejected

#: Bytes or characters looked at where the first stretch tells enough.
HEAD: Final = 64 * 1024
#: Larger JSON is read as the text it is: parsed, it takes some ten times its size in memory.
MAX_JSON: Final = 16 * 1024 * 1024

_EXTENSIONS: Final = {
    "pdf": PDF,
    "docx": DOCX,
    "docm": DOCX,
    "dotx": DOCX,
    "txt": TEXT,
    "text": TEXT,
    "log": TEXT,
    "md": MARKDOWN,
    "markdown": MARKDOWN,
    "html": HTML,
    "htm": HTML,
    "xhtml": HTML,
    "csv": CSV,
    "tsv": CSV,
    "json": JSON,
    "eml": EMAIL,
}
_ALIASES: Final = {
    "application/x-pdf": PDF,
    "application/vnd.ms-word.document.macroenabled.12": DOCX,
    "application/vnd.openxmlformats-officedocument.wordprocessingml.template": DOCX,
    "text/x-markdown": MARKDOWN,
    "application/xhtml+xml": HTML,
    "application/csv": CSV,
    "text/tab-separated-values": CSV,
    "text/json": JSON,
}
#: Declared types that say nothing.
_GENERIC: Final = ("", "application/octet-stream", "binary/octet-stream", "application/binary", "application/unknown")

#: Begins with -> what it is, in words for the error.
_UNSUPPORTED: Final = (
    (b"{\\rtf", "RTF"),
    (b"\x1f\x8b", "gzip"),
    (b"BZh", "bzip2"),
    (b"\xfd7zXZ\x00", "xz"),
    (b"(\xb5/\xfd", "zstandard"),
    (b"7z\xbc\xaf\x27\x1c", "7-Zip"),
    (b"Rar!\x1a\x07", "RAR"),
    (b"\x89PNG\r\n\x1a\n", "a PNG image"),
    (b"\xff\xd8\xff", "a JPEG image"),
    (b"GIF87a", "a GIF image"),
    (b"GIF89a", "a GIF image"),
    (b"BM", "a BMP image"),
    (b"II*\x00", "a TIFF image"),
    (b"MM\x00*", "a TIFF image"),
    (b"RIFF", "a RIFF file (WebP, WAV, AVI)"),
    (b"\x00\x00\x01\x00", "an icon"),
    (b"ID3", "an MP3"),
    (b"OggS", "Ogg media"),
    (b"fLaC", "FLAC audio"),
    (b"\x1aE\xdf\xa3", "Matroska video"),
    (b"\x7fELF", "a program"),
    (b"MZ", "a program"),
    (b"\xca\xfe\xba\xbe", "a program"),
    (b"%!PS", "PostScript"),
    (b"SQLite format 3\x00", "an SQLite database"),
    (b"PAR1", "Parquet"),
    (b"\x93NUMPY", "a NumPy array"),
)
#: Marks that a sentence might begin with as well; they count only where the rest is not text.
_SHORT: Final = (b"BM", b"MZ", b"BZh", b"ID3", b"RIFF", b"OggS", b"fLaC", b"PAR1")

_OLE: Final = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1"


class Kind(NamedTuple):
    """What the bytes are; for a text format also the decoded text. `notes` as in `Extracted.notes`."""

    media_type: str
    text: str
    notes: list[str]


def sniff(data: bytes, filename: str, declared: str) -> Kind:
    """The kind of `data`. Raises `DocumentRejected`: `unsupported_type`, `docx_encrypted`, `bad_encoding`, `no_text`, and
    `bad_pdf` or `bad_docx` for garbage that claims to be one of these."""
    hint = _hint(filename, declared)
    media_type = _binary(data, hint)
    text = ""
    notes: list[str] = []
    if media_type is None:
        text, notes = decode(data, declared)
        media_type = _text_format(data, text, hint)
    if not _agrees(hint, media_type):
        notes.append("type_mismatch")
    return Kind(media_type, text, notes)


def _hint(filename: str, declared: str) -> str:
    """What the document is said to be; empty where nobody says. The name knows more than `text/plain` does."""
    said = declared.partition(";")[0].strip().lower()
    said = "" if said in _GENERIC else _ALIASES.get(said, said)
    name = _EXTENSIONS.get(filename.rpartition(".")[2].lower(), "") if "." in filename else ""
    return name if name and said in ("", TEXT) else said


def _agrees(hint: str, media_type: str) -> bool:
    return hint in ("", media_type) or (hint == TEXT and media_type in (MARKDOWN, CSV, JSON, HTML, EMAIL))


def _binary(data: bytes, hint: str) -> str | None:
    """PDF or DOCX; None for what may be text. Raises for the formats that are neither."""
    head = data[:1024]
    if _is_pdf(head, data):
        return PDF
    if head.startswith((b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08")):
        return DOCX  # or another archive: word.py opens it once, checks it, and says what it is
    if head.startswith(_OLE):
        raise _compound_file(data)
    for mark, name in _UNSUPPORTED:
        if head.startswith(mark) and not (mark in _SHORT and _control_share(data[:HEAD]) == 0):
            raise unsupported(name)
    if head[4:8] == b"ftyp":
        raise unsupported("MP4 or HEIC media")
    if data[257:262] == b"ustar":
        raise unsupported("a tar archive")
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        return None  # UTF-16
    if _control_share(data[:HEAD]) > 0.02:
        if hint == PDF:
            raise DocumentRejected("bad_pdf", "this is not a PDF; send the file as it was saved")
        if hint == DOCX:
            raise DocumentRejected("bad_docx", "this is not a DOCX; send the file as it was saved")
        raise unsupported("binary data of an unknown kind")
    return None


def unsupported(name: str) -> DocumentRejected:
    return DocumentRejected("unsupported_type", f"this is {name}; send PDF, DOCX, text, Markdown, HTML, CSV, JSON or e-mail")


def _is_pdf(head: bytes, data: bytes) -> bool:
    """A PDF may begin anywhere in its first KiB; a text that speaks of PDF may, too, but has no end of one."""
    at = re.search(rb"%PDF-\d", head)
    return at is not None and (not head[: at.start()].strip(b"\xef\xbb\xbf\x00 \t\r\n") or b"startxref" in data)


def _compound_file(data: bytes) -> DocumentRejected:
    """Microsoft's container before OOXML, and around encrypted OOXML. Its stream names are UTF-16."""
    streams = data[: 1 << 20] + data[-(1 << 20) :]
    for name, code, what in (
        ("EncryptedPackage", "docx_encrypted", "this Office document needs a password; save it without one"),
        ("WordDocument", "unsupported_type", "this is a Word document of before 2007; save it as DOCX"),
        ("Workbook", "unsupported_type", "this is an Excel workbook of before 2007; save it as CSV"),
        ("PowerPoint Document", "unsupported_type", "this is a PowerPoint of before 2007; save it as PDF"),
        ("__substg1.0_", "unsupported_type", "this is an Outlook message; save it as .eml"),
    ):
        if name.encode("utf-16-le") in streams:
            return DocumentRejected(code, what)
    return unsupported("an OLE file")


# ── text ────────────────────────────────────────────────────────────────────────────────────────────────────────────────

#: Control characters that no text holds; NUL is judged by itself, escape begins a terminal's colours.
_CONTROL_BYTES: Final = bytes({*range(1, 32), 127} - {*b"\t\n\r\v\f\x1a\x1b"})


def _control_share(sample: bytes) -> float:
    return 1 - len(sample.translate(None, _CONTROL_BYTES)) / max(1, len(sample))


def decode(data: bytes, declared: str) -> tuple[str, list[str]]:
    """Bytes as text, and the encoding as a note where it is not UTF-8. Raises `bad_encoding`, `unsupported_type`."""
    for mark, encoding in ((b"\xef\xbb\xbf", "utf-8-sig"), (b"\xff\xfe", "utf-16"), (b"\xfe\xff", "utf-16")):
        if data.startswith(mark):
            try:
                return data.decode(encoding), []
            except UnicodeDecodeError:
                raise _bad_encoding("the byte order mark promises another encoding") from None
    if b"\0" in data:
        raise _bad_encoding("there are NUL bytes in this text")
    try:
        return data.decode("utf-8"), []
    except UnicodeDecodeError:
        pass
    if re.search(r"charset\s*=\s*\"?utf-?8", declared, re.IGNORECASE):
        raise _bad_encoding("declared as UTF-8, but it is not")
    if _headers(data[:HEAD]):
        return "", []  # a message names the encoding of each of its parts
    sample = data[:HEAD]
    if sum(byte > 127 for byte in sample) > 0.3 * len(sample):  # no language of western Europe has as many accents
        raise _bad_encoding("the encoding is unknown")
    return data.decode("cp1252", "replace"), ["encoding:cp1252"]


def _bad_encoding(why: str) -> DocumentRejected:
    return DocumentRejected("bad_encoding", f"{why}; save the text as UTF-8")


def _text_format(data: bytes, text: str, hint: str) -> str:
    """The format of a text. What is said of it counts where it can be; else what the content shows."""
    if hint in (TEXT, MARKDOWN, CSV) or (hint == HTML and _TAG.search(text[:HEAD])):
        return hint
    if _headers(data[:HEAD]):
        return EMAIL
    if _is_json(text):
        return JSON
    if _DOCUMENT.match(text[:HEAD]):
        return HTML
    if delimiter(text):
        return CSV
    if len({mark.group().strip()[:1] for mark in _MARKDOWN.finditer(text[:HEAD])}) >= 2:
        return MARKDOWN
    return TEXT


_TAG: Final = re.compile(r"<[a-zA-Z!][^<>]*>")
_DOCUMENT: Final = re.compile(
    r"\s*(?:<\?xml[^>]*>\s*)?(?:<!--.*?-->\s*)*<(?:!doctype\s+html|html|head|body)\b", re.IGNORECASE | re.DOTALL
)
#: A heading, a fence, a list, a quotation, a link: two different ones make Markdown.
_MARKDOWN: Final = re.compile(r"^#{1,6} \S|^```|^[*-] \S|^> \S|\[[^\]\n]{1,200}\]\([^)\s]{1,500}\)", re.MULTILINE)
_FIELD: Final = re.compile(rb"([!-9;-~]+):[ \t]*|[ \t]+\S")
_FIELDS: Final = frozenset(
    b"from to cc subject date message-id mime-version received return-path reply-to sender content-type delivered-to".split()
)


def _headers(head: bytes) -> bool:
    """Whether this begins as a message does (RFC 5322): header lines only, two of them well known, then an empty line."""
    known: set[bytes] = set()
    for line in head.lstrip(b"\r\n").splitlines():
        if not line:
            return len(known) >= 2
        field = _FIELD.match(line)
        if field is None:
            return False
        if field[1] and field[1].lower() in _FIELDS:
            known.add(field[1].lower())
    return len(known) >= 3  # headers without a body


def _is_json(text: str) -> bool:
    """An object or a list; a lone number or word is text."""
    if not re.match(r"\s*[{\[]", text) or len(text) > MAX_JSON:
        return False
    try:
        json.loads(text)
    except RecursionError:
        return True  # the reader says that it is too deep
    except ValueError:
        return False
    return True


def delimiter(text: str) -> str:
    """What separates the columns of a table; empty where this is none: 3 rows of the same 2 or more cells at least."""
    lines = [line for line in text[:HEAD].splitlines()[:50] if line.strip()]
    if len(text) > HEAD or len(lines) == 50:
        lines = lines[:-1]  # perhaps cut in the middle
    for candidate in ",;\t|":
        try:
            widths = {len(row) for row in csv.reader(lines, delimiter=candidate)}
        except csv.Error:
            continue
        if len(lines) >= 3 and len(widths) == 1 and widths.pop() >= 2:
            return candidate
    return ""
