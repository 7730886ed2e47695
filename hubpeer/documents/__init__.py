"""Documents: bytes in, clean text out, nothing else touched.

    extractor.py   the hub's side: one call per document, deadlines, restarts
    zygote.py      the process that forks one child per document
    cage.py        what a child may not do: limits, files, network, signals
    parts.py       what a child says, and how it is framed on the wire between the processes
    sniff.py       what kind of document these bytes are
    readers.py     every kind to its reader; the text formats
    pdf.py         PDF
    word.py        DOCX

Only this folder imports pypdf, pypdfium2 and lxml, and only a child process ever gives them a document's bytes.
"""

from hubpeer.documents.extractor import Extracted, Extractor

__all__ = ["Extracted", "Extractor"]
