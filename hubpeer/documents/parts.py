"""What a child process says of a document, and how it travels to the hub. No reading of documents here.

A child writes `Part`s, each framed as four bytes of length and msgpack. They are written as they come, so that a child killed
in the middle has already handed over what it finished. The hub believes nothing a child says beyond these types and caps:
a child that read a hostile document may no longer be ours.
"""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, Literal

import msgspec

from hubpeer.errors import DocumentRejected

PDF: Final = "application/pdf"
DOCX: Final = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
TEXT: Final = "text/plain"
MARKDOWN: Final = "text/markdown"
HTML: Final = "text/html"
CSV: Final = "text/csv"
JSON: Final = "application/json"
EMAIL: Final = "message/rfc822"
MEDIA_TYPES: Final = (PDF, DOCX, TEXT, MARKDOWN, HTML, CSV, JSON, EMAIL)

MAX_HEADINGS: Final = 32
MAX_NOTES: Final = 16
MAX_LINE: Final = 200  # characters of a title or heading


class Task(msgspec.Struct, frozen=True):
    """What a child is asked to do, beside the document itself. Sizes in bytes, times in seconds."""

    filename: str
    declared: str
    max_pages: int
    max_chars: int
    memory: int
    cpu_s: int
    #: Read PDF with this engine only; empty: the best there is.
    pdf_engine: Literal["", "pypdf"] = ""


class Part(msgspec.Struct, frozen=True, array_like=True):
    """One thing a child says.

    `page` is the text of a page, `text` a stretch of a document without pages; `rejected` ends the document with `code`;
    `end` says that everything was read. The others are facts, which may come at any time.
    """

    kind: Literal["type", "engine", "title", "heading", "note", "page", "text", "rejected", "end"]
    text: str = ""
    code: str = ""


_REASONS: Final = {
    "no_text": "there is no text in this document; if it is a scan, recognize its text first",
    "extraction_timeout": "reading took too long; split the document or send its text",
    "extraction_memory": "reading needs more memory than a document may use; split the document or send its text",
    "extraction_crashed": "the reader broke on this document; save it anew or send its text",
}


def rejected(code: str) -> DocumentRejected:
    """The error for what both sides may find: the child in time, or the hub when the child has ended."""
    return DocumentRejected(code, _REASONS[code])


class BadFrame(Exception):
    """A child wrote what no child of ours would write."""


_LENGTH: Final = struct.Struct(">I")
_encoder: Final = msgspec.msgpack.Encoder()
_decoder: Final = msgspec.msgpack.Decoder(Part)


def frame(part: Part) -> bytes:
    body = _encoder.encode(part)
    return _LENGTH.pack(len(body)) + body


class Deframer:
    """Bytes in, whole parts out. Raises `BadFrame` for anything else, and after `limit` bytes in all."""

    def __init__(self, limit: int) -> None:
        self._buffer = bytearray()
        self._left = limit

    def feed(self, data: bytes) -> Iterator[Part]:
        self._left -= len(data)
        if self._left < 0:
            raise BadFrame("more than a document may hold")
        self._buffer += data
        while len(self._buffer) >= _LENGTH.size:
            end = _LENGTH.size + _LENGTH.unpack_from(self._buffer)[0]
            if end - len(self._buffer) > self._left:
                raise BadFrame("a frame longer than a document may be")
            if len(self._buffer) < end:
                return
            body = bytes(self._buffer[_LENGTH.size : end])
            del self._buffer[:end]
            try:
                yield _decoder.decode(body)
            except (msgspec.DecodeError, UnicodeDecodeError) as exc:
                raise BadFrame("not a part") from exc


# Line ends in all their forms, among them the vertical tab and form feed of PDF and Word.
_LINE_ENDS: Final = re.compile(r"\r\n?|[\x0b\x0c\x85\u2028\u2029]")
# Control characters but \n and \t, noncharacters (pdfium writes U+FFFE for a hyphen at a line's end), byte order marks.
_CONTROLS: Final = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\ufffe\uffff\ufeff]")
_SURROGATES: Final = re.compile(r"[\ud800-\udfff]")


def clean(text: str) -> str:
    r"""`text` as it may be stored and sent: line ends are \n, no NUL, no lone surrogate, no control character but \n and \t."""
    return _SURROGATES.sub("\ufffd", _CONTROLS.sub("", _LINE_ENDS.sub("\n", text)))


def one_line(text: str) -> str:
    """`text` as a title or a heading: cleaned, on one line, of at most `MAX_LINE` characters."""
    return " ".join(clean(text[: 4 * MAX_LINE]).split())[:MAX_LINE]
