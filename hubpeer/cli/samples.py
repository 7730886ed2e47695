"""Small documents the demo makes itself: a real PDF, a real DOCX, text, Markdown, CSV and e-mail."""

from __future__ import annotations

import io
import zipfile
from email.message import EmailMessage
from textwrap import wrap

_CONTRACT = (
    "Master Services Agreement between Northwind Ltd (the Supplier) and Acme Corp (the Customer), effective 1 March 2026. "
    "The Supplier shall provide the Services described in Schedule 1. The Customer shall pay the fees within thirty days of "
    "the invoice date. Either party may terminate this Agreement on ninety days' written notice. Confidentiality survives "
    "termination for five years. Liability of either party is limited to the fees paid in the preceding twelve months."
)
_REPORT = [
    "Quarterly financial report",
    "Revenue in the third quarter reached 4.2 million euro, up 8 percent on the year before. Gross margin rose to 41 percent.",
    "Operating costs grew more slowly than revenue; profit before tax was 610,000 euro. Cash flow stays positive.",
]
_BRIEF = """# Campaign brief: spring launch

Target audience: families in mid-size towns. Channels: search, social media, two newsletters.
Goal: 3,000 new sign-ups at a cost per acquisition under 14 euro. The creative concept is due on 12 February.
"""
_PIPELINE = (
    "deal,stage,amount_eur,close_date,owner\n"
    "Globex renewal,negotiation,48000,2026-03-31,Kim\n"
    "Initech rollout,proposal,125000,2026-05-15,Lee\n"
    "Umbrella pilot,qualified,18000,2026-04-20,Kim\n"
)


def all_kinds() -> dict[str, bytes]:
    """File name -> bytes."""
    mail = EmailMessage()
    mail["Subject"], mail["From"], mail["To"] = "Invoice 2026-118", "billing@northwind.example", "accounts@acme.example"
    mail["Date"] = "Mon, 02 Mar 2026 09:00:00 +0000"
    mail.set_content("Please find our invoice 2026-118: amount due 12,400.00 EUR, payment within 30 days, VAT included.")
    return {
        "services-agreement.pdf": pdf(_CONTRACT),
        "q3-report.docx": docx(_REPORT),
        "campaign-brief.md": _BRIEF.encode(),
        "pipeline.csv": _PIPELINE.encode(),
        "invoice.eml": mail.as_bytes(),
        "minutes.txt": b"Minutes of the product meeting, 4 March. Present: Ana, Joe, Mia.\n"
        b"Decisions: the release moves to April; Joe follows up with support. Action items: Mia drafts the announcement.\n",
    }


def broken_pdf() -> bytes:
    """The first half of a PDF, as an upload that broke off leaves it."""
    whole = pdf(_CONTRACT)
    return whole[: len(whole) // 3]


def pdf(text: str) -> bytes:
    """One page of text as PDF 1.4 (ISO 32000-1, 7.5: header, objects, cross-reference table, trailer)."""
    lines = [line.replace("\\", r"\\").replace("(", r"\(").replace(")", r"\)") for line in wrap(text, 90)]
    drawn = "BT /F1 11 Tf 14 TL 60 780 Td " + " ".join(f"({line}) Tj T*" for line in lines) + " ET"
    objects = [
        "<< /Type /Catalog /Pages 2 0 R >>",
        "<< /Type /Pages /Kids [3 0 R] /Count 1 >>",
        "<< /Type /Page /Parent 2 0 R /MediaBox [0 0 595 842] /Contents 4 0 R /Resources << /Font << /F1 5 0 R >> >> >>",
        f"<< /Length {len(drawn)} >>\nstream\n{drawn}\nendstream",
        "<< /Type /Font /Subtype /Type1 /BaseFont /Helvetica >>",
    ]
    out = io.BytesIO()
    out.write(b"%PDF-1.4\n")
    offsets = []
    for number, body in enumerate(objects, start=1):
        offsets.append(out.tell())
        out.write(f"{number} 0 obj\n{body}\nendobj\n".encode("latin-1"))
    table = out.tell()
    out.write(f"xref\n0 {len(objects) + 1}\n0000000000 65535 f \n".encode())
    out.writelines(f"{offset:010d} 00000 n \n".encode() for offset in offsets)
    out.write(f"trailer\n<< /Size {len(objects) + 1} /Root 1 0 R >>\nstartxref\n{table}\n%%EOF\n".encode())
    return out.getvalue()


def docx(paragraphs: list[str]) -> bytes:
    """Paragraphs as a minimal DOCX (ECMA-376 part 1: content types, package relationship, main document)."""
    word = "http://schemas.openxmlformats.org/wordprocessingml/2006/main"
    package = "http://schemas.openxmlformats.org/package/2006"
    office = "http://schemas.openxmlformats.org/officeDocument/2006/relationships/officeDocument"
    kind = "application/vnd.openxmlformats-officedocument.wordprocessingml.document.main+xml"
    head = '<?xml version="1.0" encoding="UTF-8" standalone="yes"?>\n'
    body = "".join(f"<w:p><w:r><w:t>{_escaped(text)}</w:t></w:r></w:p>" for text in paragraphs)
    parts = {
        "[Content_Types].xml": f'{head}<Types xmlns="{package}/content-types">'
        '<Default Extension="rels" ContentType="application/vnd.openxmlformats-package.relationships+xml"/>'
        f'<Override PartName="/word/document.xml" ContentType="{kind}"/></Types>',
        "_rels/.rels": f'{head}<Relationships xmlns="{package}/relationships">'
        f'<Relationship Id="r1" Type="{office}" Target="word/document.xml"/></Relationships>',
        "word/document.xml": f'{head}<w:document xmlns:w="{word}"><w:body>{body}</w:body></w:document>',
    }
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in parts.items():
            archive.writestr(name, content)
    return out.getvalue()


def _escaped(text: str) -> str:
    return text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
