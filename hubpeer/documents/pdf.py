"""PDF, page by page: pdfium where it is installed, pypdf otherwise, and each for the pages on which the other fails.

pdfium reads more files and is some eight times as fast; it has no limits of its own and may take the process with it. pypdf
has limits, set below, and is asked last or alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from contextlib import suppress
from io import BytesIO
from itertools import islice
from operator import methodcaller
from typing import Any, Final, Literal, Protocol, TypeVar

import pypdf
from pypdf.errors import FileNotDecryptedError, LimitReachedError

from hubpeer.documents.parts import MAX_HEADINGS, Part
from hubpeer.errors import DocumentRejected

try:
    import pypdfium2
except ImportError:  # the extra hubpeer[pdf]
    pypdfium2 = None

T = TypeVar("T")

#: What a viewer would run or start. Compressed objects hide from this search; it is a warning to people, not a defence:
#: nothing in a document is ever run.
_ACTIVE: Final = re.compile(rb"/(?:JavaScript|JS|Launch|RichMedia)\b")


def read(data: bytes, max_pages: int, engine: Literal["", "pypdf"] = "") -> Iterator[Part]:
    """Raises `DocumentRejected`: `bad_pdf`, `pdf_encrypted`, `too_many_pages`, `doc_too_large`."""
    document = _Document(data, max_pages, [_Pypdf] if engine or pypdfium2 is None else [_Pdfium, _Pypdf])
    pages = document.ask(lambda engine: engine.pages)
    if pages > max_pages:
        raise DocumentRejected("too_many_pages", f"a document may have {max_pages} pages at most; split it")
    yield Part("engine", document.ask(lambda engine: engine.name))
    if _ACTIVE.search(data):
        yield Part("note", "active_content")
    yield from _facts(document)

    failures = []
    for number in range(pages):
        try:
            # One bad page must not cost the others: of 24 damaged real files that failed as a whole, each has readable pages.
            text: str = document.ask(methodcaller("text", number))
        except DocumentRejected as exc:
            failures.append(exc)
        else:
            yield Part("page", _tidy(text))
    if not pages:
        raise _rejection({"bad_pdf"})
    if len(failures) == pages:
        raise _rejection({failure.code for failure in failures})
    if failures:
        yield Part("note", f"pages_failed:{len(failures)}")


def _facts(document: _Document) -> Iterator[Part]:
    """What is good to know and no reason to fail."""
    with suppress(DocumentRejected):
        yield Part("title", document.ask(lambda engine: engine.title()))
    with suppress(DocumentRejected):
        for heading in document.ask(lambda engine: list(islice(engine.outline(), MAX_HEADINGS))):
            yield Part("heading", heading)
    with suppress(DocumentRejected):
        count = document.ask(lambda engine: engine.attachments())
        if count:
            yield Part("note", f"attachments:{count}")


def _tidy(text: str) -> str:
    """Layout leaves blanks at line ends and runs of empty lines; a paragraph's break is enough."""
    return re.sub(r"\n{3,}", "\n\n", re.sub(r"[ \t]+\n", "\n", text.replace("\r\n", "\n"))).strip()


# ── the engines ─────────────────────────────────────────────────────────────────────────────────────────────────────────


class _Engine(Protocol):
    """An opened PDF. Everything here may raise anything."""

    name: str
    pages: int

    def __init__(self, data: bytes, max_pages: int) -> None: ...
    def text(self, number: int) -> str: ...
    def title(self) -> str: ...
    def outline(self) -> Iterator[str]: ...
    def attachments(self) -> int: ...


class _Document:
    """One PDF and the engines that can be asked about it, the best first; the next is opened where those before it fail."""

    def __init__(self, data: bytes, max_pages: int, kinds: list[type[_Engine]]) -> None:
        self._data = data
        self._max_pages = max_pages
        self._opened: list[_Engine] = []
        self._unopened = kinds

    def ask(self, question: Callable[[_Engine], T]) -> T:
        """The first answer. Raises `DocumentRejected` where every engine fails."""
        failures: set[str] = set()
        for engine in self._opened:
            try:
                return question(engine)
            except Exception as exc:
                failures.add(_code(exc))
        while self._unopened:
            try:
                engine = self._unopened.pop(0)(self._data, self._max_pages)
                self._opened.append(engine)
                return question(engine)
            except Exception as exc:
                failures.add(_code(exc))
        raise _rejection(failures)


_PASSWORD: Final = 4  # FPDF_ERR_PASSWORD

#: The most telling first: what one engine calls damaged, the other may know to be encrypted.
_REASONS: Final = {
    "pdf_encrypted": "this PDF needs a password; save it without one",
    "doc_too_large": "this PDF unpacks to more than a document may hold; split it",
    "bad_pdf": "this PDF is damaged; save it anew",
}


def _code(exc: Exception) -> str:
    """What an engine's exception means. Memory that has run out is nobody's page, so that one goes on up."""
    if isinstance(exc, MemoryError):
        raise exc
    if isinstance(exc, FileNotDecryptedError) or getattr(exc, "err_code", None) == _PASSWORD:
        return "pdf_encrypted"
    return "doc_too_large" if isinstance(exc, LimitReachedError) else "bad_pdf"


def _rejection(codes: set[str]) -> DocumentRejected:
    code = next((code for code in _REASONS if code in codes), "bad_pdf")
    return DocumentRejected(code, _REASONS[code])


class _Pdfium:
    name = f"pdfium {pypdfium2.PDFIUM_INFO.build}" if pypdfium2 else ""

    def __init__(self, data: bytes, max_pages: int) -> None:
        self._pdf = pypdfium2.PdfDocument(data)
        self.pages = len(self._pdf)

    def text(self, number: int) -> str:
        page = self._pdf[number]
        try:
            text_page = page.get_textpage()
            try:
                text: str = text_page.get_text_bounded()
                return text
            finally:
                text_page.close()
        finally:
            page.close()

    def title(self) -> str:
        title: str = self._pdf.get_metadata_value("Title")
        return title

    def outline(self) -> Iterator[str]:
        return (entry.get_title() for entry in self._pdf.get_toc(max_depth=3))

    def attachments(self) -> int:
        count: int = self._pdf.count_attachments()
        return count


class _Pypdf:
    name = f"pypdf {pypdf.__version__}"

    def __init__(self, data: bytes, max_pages: int) -> None:
        # For the rest of this process, which reads one document. The other limits are pypdf's own: 75 MB per filter, 300 MB
        # of decoding and 2 million tokens per stream; time is the hub's to limit.
        pypdf.overwrite_configuration(page_tree_maximum_entries=2 * max_pages + 1000, jbig2dec_binary=None)
        self._pdf = pypdf.PdfReader(BytesIO(data))
        declared: Any = self._pdf.root_object["/Pages"].get_object()
        # The declared number first: walking the tree of far too many pages takes long, and ends at the limit above.
        self.pages = count if (count := int(declared.get("/Count", 0))) > max_pages else len(self._pdf.pages)

    def text(self, number: int) -> str:
        return self._pdf.pages[number].extract_text()

    def title(self) -> str:
        metadata = self._pdf.metadata
        return (metadata and metadata.title) or ""

    def outline(self) -> Iterator[str]:
        return (str(entry["/Title"]) for entry in self._pdf.outline if not isinstance(entry, list))

    def attachments(self) -> int:
        return len(self._pdf.attachments)
