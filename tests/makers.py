"""Real files, made on the spot: what the tests and the examples feed to the hub."""

from __future__ import annotations

import io
import re
import zipfile
import zlib
from collections.abc import Iterable, Mapping, Sequence
from email.message import EmailMessage

import docx as python_docx
import pypdf

Objects = Sequence[bytes]


def pdf(text_pages: Iterable[str], title: str | None = None) -> bytes:
    """A PDF with one page for each text (Latin-1); a line of text is a line of the page."""
    return pdf_of([_page_content(text) for text in text_pages], title)


def _page_content(text: str) -> bytes:
    lines = [re.sub(r"([\\()])", r"\\\1", line) for line in text.split("\n")]
    return b"BT /F1 11 Tf 14 TL 50 780 Td " + " ".join(f"({line}) Tj T*" for line in lines).encode("latin-1") + b" ET"


def pdf_of(contents: Sequence[bytes], title: str | None = None, *, dictionary: bytes = b"", catalog: bytes = b"") -> bytes:
    """A PDF of raw page contents; `dictionary` is added to each of their dictionaries, e.g. `/Filter /FlateDecode`."""
    kids = b" ".join(b"%d 0 R" % (4 + 2 * i) for i in range(len(contents)))
    objects = [
        b"<< /Type /Catalog /Pages 2 0 R " + catalog + b" >>",
        b"<< /Type /Pages /Kids [" + kids + b"] /Count %d >>" % len(contents),
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica /Encoding /WinAnsiEncoding >>",
    ]
    for number, content in enumerate(contents):
        objects.append(
            b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >>"
            b" /Contents %d 0 R >>" % (5 + 2 * number)
        )
        objects.append(b"<< /Length %d %s >>\nstream\n%s\nendstream" % (len(content), dictionary, content))
    info = b""
    if title is not None:
        objects.append(b"<< /Title (" + title.encode("latin-1") + b") >>")
        info = b" /Info %d 0 R" % len(objects)
    return pdf_file(objects, info)


def pdf_file(objects: Objects, trailer: bytes = b"") -> bytes:
    """A PDF of numbered objects, the first of which is the catalog."""
    out = bytearray(b"%PDF-1.7\n%\xe2\xe3\xcf\xd3\n")
    places = []
    for number, body in enumerate(objects, 1):
        places.append(len(out))
        out += b"%d 0 obj\n%s\nendobj\n" % (number, body)
    start = len(out)
    out += b"xref\n0 %d\n0000000000 65535 f \n" % (len(objects) + 1)
    out += b"".join(b"%010d 00000 n \n" % place for place in places)
    out += b"trailer\n<< /Size %d /Root 1 0 R%s >>\nstartxref\n%d\n%%%%EOF\n" % (len(objects) + 1, trailer, start)
    return bytes(out)


def encrypted_pdf(text: str, password: str, algorithm: str = "AES-256") -> bytes:
    """A PDF that opens with `password`; with the empty one it opens for everybody."""
    writer = pypdf.PdfWriter(clone_from=io.BytesIO(pdf([text])))
    writer.encrypt(user_password=password, owner_password="owner", algorithm=algorithm)
    out = io.BytesIO()
    writer.write(out)
    return out.getvalue()


def flate_bomb_pdf(size: int, filters: int = 1) -> bytes:
    """A page whose content unpacks to `size` bytes of nothing, packed `filters` times over."""
    # One packed MiB of blanks, over and over: packing all of it would take longer than any test may.
    blanks = b" " * (1 << 20)
    packer = zlib.compressobj(9, wbits=-15)
    block = packer.compress(blanks) + packer.flush(zlib.Z_FULL_FLUSH)
    checksum = 1
    for _ in range(size >> 20):
        checksum = zlib.adler32(blanks, checksum)
    data = b"\x78\xda" + block * (size >> 20) + packer.flush() + checksum.to_bytes(4, "big")
    for _ in range(filters - 1):
        data = zlib.compress(data, 9)
    return pdf_of([data], dictionary=b"/Filter [" + b"/FlateDecode " * filters + b"]")


def operators_pdf(count: int) -> bytes:
    """A page that shows one letter `count` times."""
    content = zlib.compress(b"BT /F1 1 Tf 1 0 0 1 50 700 Tm " + b"(a) Tj " * count + b"ET", 9)
    return pdf_of([content], dictionary=b"/Filter /FlateDecode")


def repeated_page_pdf(times: int, operators: int) -> bytes:
    """One costly page, named `times` times in the page tree."""
    content = zlib.compress(b"BT /F1 10 Tf 50 700 Td " + b"(a) Tj " * operators + b"ET", 9)
    return pdf_file([
        b"<< /Type /Catalog /Pages 2 0 R >>",
        b"<< /Type /Pages /Kids [" + b"4 0 R " * times + b"] /Count %d >>" % times,
        b"<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
        b"<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Resources << /Font << /F1 3 0 R >> >> /Contents 5 0 R >>",
        b"<< /Length %d /Filter /FlateDecode >>\nstream\n%s\nendstream" % (len(content), content),
    ])  # fmt: skip


def docx(
    paragraphs: Iterable[str], table: Sequence[Sequence[str]] | None = None, *, title: str = "", heading: str = ""
) -> bytes:
    """A Word document as python-docx writes it."""
    document = python_docx.Document()
    document.core_properties.title = title
    if heading:
        document.add_heading(heading, level=1)
    for paragraph in paragraphs:
        document.add_paragraph(paragraph)
    if table:
        grid = document.add_table(rows=len(table), cols=len(table[0]))
        for row, cells in zip(grid.rows, table, strict=True):
            for cell, text in zip(row.cells, cells, strict=True):
                cell.text = text
    out = io.BytesIO()
    document.save(out)
    return out.getvalue()


W = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
MC = "http://schemas.openxmlformats.org/markup-compatibility/2006"
DOCUMENT_TYPE = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"


def archive(entries: Mapping[str, bytes | str]) -> bytes:
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in entries.items():
            target.writestr(name, content)
    return out.getvalue()


def content_types(part: str, kind: str) -> str:
    """The list that makes an archive an Office document, with one part in it."""
    namespace = "http://schemas.openxmlformats.org/package/2006/content-types"
    return f'<Types xmlns="{namespace}"><Override PartName="{part}" ContentType="{kind}"/></Types>'


def raw_docx(
    body: str, *, prolog: str = "", main_type: str = DOCUMENT_TYPE, more: Mapping[str, bytes | str] | None = None
) -> bytes:
    """A Word document of raw XML: `body` inside w:body, `prolog` before the root element, `more` entries of the archive."""
    return archive({
        "[Content_Types].xml": content_types("/word/document.xml", main_type),
        "word/document.xml": (
            f'<?xml version="1.0"?>{prolog}<w:document xmlns:w="{W}" xmlns:mc="{MC}"><w:body>{body}</w:body></w:document>'
        ),
        **(more or {}),
    })  # fmt: skip


def paragraph(text: str) -> str:
    return f"<w:p><w:r><w:t>{text}</w:t></w:r></w:p>"


def zip_bomb_docx(size: int) -> bytes:
    """A document whose text is `size` times the letter a."""
    return raw_docx(paragraph("a" * size))


def eml(
    subject: str, body: str, *, html: str | None = None, attachments: Sequence[bytes] = (), sender: str = "ann@example.org"
) -> bytes:
    message = EmailMessage()
    message["From"] = sender
    message["To"] = "bob@example.org"
    message["Subject"] = subject
    message["Date"] = "Tue, 03 Nov 2026 10:00:00 +0000"
    message.set_content(body)
    if html is not None:
        message.add_alternative(html, subtype="html")
    for number, data in enumerate(attachments):
        message.add_attachment(data, maintype="application", subtype="octet-stream", filename=f"file{number}.bin")
    return message.as_bytes()
