"""Bytes in; text or one coded error out. Every document here goes through a real child process."""

from __future__ import annotations

import asyncio
import gzip
import os
import random
import signal
import sys
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
import pytest_asyncio

sys.path.insert(0, str(Path(__file__).parents[1]))
import makers

from hubpeer.documents import Extracted, Extractor
from hubpeer.errors import DocumentRejected, Unavailable
from hubpeer.settings import Documents, MiB

LIMITS = Documents(timeout_s=20.0)  # the machine that tests may be busy
PDF = "application/pdf"
DOCX = "application/vnd.openxmlformats-officedocument.wordprocessingml.document"
FALLBACK = (
    f"<mc:AlternateContent><mc:Choice>{makers.paragraph('once')}</mc:Choice>"
    f"<mc:Fallback>{makers.paragraph('twice')}</mc:Fallback></mc:AlternateContent>"
)
REVISED = (
    "<w:sdt><w:sdtContent><w:p><w:ins><w:r><w:t>in</w:t></w:r></w:ins>"
    "<w:del><w:r><w:delText>out</w:delText></w:r></w:del></w:p></w:sdtContent></w:sdt>"
)
LAUGHS = '<!DOCTYPE x [<!ENTITY l0 "lol">' + "".join(f'<!ENTITY l{i + 1} "{f"&l{i};" * 10}">' for i in range(9)) + "]>"
SCRIPT = b"/OpenAction << /S /JavaScript /JS (app.alert) >>"
MULTIPART = b"Content-Type: multipart/mixed; boundary=b%d\n\n--b%d\n"
OLE = b"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1" + bytes(504)


pytestmark = pytest.mark.asyncio(loop_scope="module")  # one loop, so that the table's tests can share an extractor


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def extractor() -> AsyncIterator[Extractor]:
    """For tests that read documents."""
    extractor = Extractor(LIMITS)
    await extractor.start()
    yield extractor
    await extractor.close()


@pytest_asyncio.fixture(loop_scope="module")
async def own() -> AsyncIterator[Extractor]:
    """For tests that look at processes or counts."""
    extractor = Extractor(LIMITS)
    await extractor.start()
    yield extractor
    await extractor.close()


async def code_of(extractor: Extractor, data: bytes, filename: str = "", declared: str | None = None) -> str:
    with pytest.raises(DocumentRejected) as raised:
        await extractor.extract(data, filename, declared)
    message = raised.value.message
    assert len(message) < 200 and "/" not in message and "Traceback" not in message
    return raised.value.code


async def until(true: Callable[[], object]) -> None:
    """Wait for a state."""
    async with asyncio.timeout(20):
        while not true():
            await asyncio.sleep(0.005)


def children_of(pid: int) -> list[int]:
    """Living children; the dead that nobody has buried yet do not count."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except (FileNotFoundError, ProcessLookupError):
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def zygote_of(extractor: Extractor) -> int:
    pid = extractor.status()["zygote_pid"]
    assert isinstance(pid, int)
    return pid


#: A document that keeps a child busy far longer than any test waits.
def slow() -> bytes:
    return makers.repeated_page_pdf(4000, 20_000)


READ: list[tuple[str, bytes, str, str | None, str, list[str], list[str]]] = [
    # what, bytes, file name, declared, media type, words in the text, notes
    (
        "pdf",
        makers.pdf(["Quarterly (figures)\nsecond line", "page two"]),
        "",
        None,
        PDF,
        ["Quarterly (figures)", "page two"],
        [],
    ),
    ("pdf after junk", b"\r\n\r\n" + makers.pdf(["late start"]), "", None, PDF, ["late start"], []),
    ("pdf for all to open", makers.encrypted_pdf("public words", ""), "", None, PDF, ["public words"], []),
    ("pdf RC4", makers.encrypted_pdf("public words", "", "RC4-128"), "", None, PDF, ["public words"], []),
    ("pdf declared HTML", makers.pdf(["words"]), "x.html", "text/html", PDF, ["words"], ["type_mismatch"]),
    (
        "pdf with a script",
        makers.pdf_of([b"BT /F1 9 Tf (words) Tj ET"], catalog=SCRIPT),
        "",
        None,
        PDF,
        ["words"],
        ["active_content"],
    ),
    (
        "docx",
        makers.docx(["first", "second"], [["a", "b"], ["c", "d"]]),
        "x.docx",
        DOCX,
        DOCX,
        ["first\nsecond", "a\tb\nc\td"],
        [],
    ),
    (
        "docm",
        makers.raw_docx(makers.paragraph("hello"), main_type="application/vnd.ms-word.document.macroEnabled.main+xml"),
        "x.docm",
        None,
        DOCX,
        ["hello"],
        ["macros"],
    ),
    ("docx, fallback said twice", makers.raw_docx(FALLBACK), "", None, DOCX, ["once"], []),
    ("docx, content control, insertion, deletion", makers.raw_docx(REVISED), "", None, DOCX, ["in"], []),
    (
        "docx that climbs out",
        makers.raw_docx(makers.paragraph("inside"), more={"../../x": "outside"}),
        "",
        None,
        DOCX,
        ["inside"],
        [],
    ),
    ("text", b"Dear all,\r\nthe plan.\n", "", None, "text/plain", ["Dear all,\nthe plan."], []),
    ("text of UTF-16", "Grüße\r\nan alle".encode("utf-16"), "", None, "text/plain", ["Grüße\nan alle"], []),
    (
        "text of Latin-1",
        "Prüfung der Bücher für März".encode("latin-1"),
        "",
        None,
        "text/plain",
        ["Prüfung der Bücher für März"],
        ["encoding:cp1252"],
    ),
    ("text with a BOM", b"\xef\xbb\xbfhello", "", None, "text/plain", ["hello"], []),
    ("text that speaks of PDF", b"A PDF begins with %PDF-1.7, I am told.", "", None, "text/plain", ["I am told"], []),
    ("text that begins as a bitmap does", b"BM is short for a good many things.", "", None, "text/plain", ["BM is short"], []),
    ("text declared PDF", b"not at all", "x.pdf", PDF, "text/plain", ["not at all"], ["type_mismatch"]),
    ("markdown by name", b"plain words", "notes.md", "text/plain", "text/markdown", ["plain words"], []),
    ("markdown by content", b"# Plan\n\n- one\n- two\n\nSee [that](http://x.y).\n", "", None, "text/markdown", ["# Plan"], []),
    (
        "html",
        b"<!doctype html><style>p{}</style><p>one<p>two <b>b</b>old<script>alert(1)</script>",
        "",
        None,
        "text/html",
        ["one\ntwo bold"],
        ["active_content"],
    ),
    ("html of Latin-1", "<html><meta charset=iso-8859-1><p>Bücher".encode(), "", None, "text/html", ["Bücher"], []),
    ("csv", b"name;sum\nann;1\nbob;2\n", "", None, "text/csv", ["name\tsum\nann\t1\nbob\t2"], []),
    (
        "json",
        b'{"name": "Ann", "sums": [1, 2.5, null], "at": {"city": "Gr\\u00e4z"}}',
        "",
        None,
        "application/json",
        ["name: Ann", "- 2.5", "  city: Gräz"],
        [],
    ),
    ("json, broken", b'{"name": ', "x.json", "application/json", "text/plain", ['{"name":'], ["type_mismatch"]),
    (
        "mail",
        makers.eml("Offer", "Dear Bob", html="<p>Dear <b>Bob</b>", attachments=[b"x", b"y"]),
        "",
        None,
        "message/rfc822",
        ["Subject: Offer", "From: ann@example.org", "Dear Bob"],
        ["attachments:2"],
    ),
    ("controls", b"a\x1b[31mb\x0cc", "", None, "text/plain", ["a[31mb\nc"], []),
]


@pytest.mark.parametrize(
    ("data", "filename", "declared", "media_type", "words", "notes"), [pytest.param(*row[1:], id=row[0]) for row in READ]
)
async def test_is_read(
    extractor: Extractor, data: bytes, filename: str, declared: str | None, media_type: str, words: list[str], notes: list[str]
) -> None:
    extracted = await extractor.extract(data, filename, declared)
    assert (extracted.media_type, extracted.outcome, extracted.notes) == (media_type, "ok", notes)
    assert [word for word in words if word not in extracted.text] == []
    assert not any(unwanted in extracted.text for unwanted in ("twice", "out", "alert", "\0", "\r"))
    assert extracted.engine and extracted.pages >= 1


HOLEY_ZIP = makers.docx(["x"])[:-200]
REJECTED: list[tuple[str, bytes, str, str | None, str]] = [
    # what, bytes, file name, declared, code
    ("nothing", b"", "", None, "empty_document"),
    ("blanks", b" \n\t \r\n", "", None, "no_text"),
    ("a million empty lines", b"\n" * 1_000_000, "", None, "no_text"),
    ("pdf, header only", b"%PDF-1.7\n", "", None, "bad_pdf"),
    ("pdf, cut off", makers.pdf(["x"])[:150], "", None, "bad_pdf"),
    ("garbage called pdf", random.Random(1).randbytes(5000), "x.pdf", None, "bad_pdf"),
    (
        "pdf, its page tree a loop",
        makers.pdf_file([b"<< /Type /Catalog /Pages 2 0 R >>", b"<< /Type /Pages /Kids [2 0 R] /Count 1 >>"]),
        "",
        None,
        "bad_pdf",
    ),
    ("pdf with a password", makers.encrypted_pdf("secret", "open sesame"), "", None, "pdf_encrypted"),
    ("pdf of a scan", makers.pdf_of([b"q Q", b"q Q"]), "", None, "no_text"),
    ("pdf of 5,001 pages", makers.pdf_of([b""] * 5001), "", None, "too_many_pages"),
    ("docx, cut off", HOLEY_ZIP, "x.docx", None, "bad_docx"),
    ("garbage called docx", random.Random(2).randbytes(5000), "", DOCX, "bad_docx"),
    ("docx without a document", makers.archive({"[Content_Types].xml": makers.content_types("/x", "y")}), "", None, "bad_docx"),
    ("docx, XML broken", makers.raw_docx("<w:p>"), "", None, "bad_docx"),
    (
        "docx, an entity of a file",
        makers.raw_docx(makers.paragraph("a&x;"), prolog='<!DOCTYPE x [<!ENTITY x SYSTEM "file:///etc/passwd">]>'),
        "",
        None,
        "bad_docx",
    ),
    ("docx, a billion laughs", makers.raw_docx(makers.paragraph("&l9;"), prolog=LAUGHS), "", None, "bad_docx"),
    ("docx of 40 MB in 40 KB", makers.zip_bomb_docx(40_000_000), "", None, "doc_too_large"),
    (
        "docx of 5,001 entries",
        makers.raw_docx(makers.paragraph("x"), more={f"{i}.xml": "" for i in range(5000)}),
        "",
        None,
        "bad_docx",
    ),
    ("docx with a password", OLE + "EncryptedPackage".encode("utf-16-le"), "x.docx", None, "docx_encrypted"),
    ("doc", OLE + "WordDocument".encode("utf-16-le"), "x.docx", None, "unsupported_type"),
    (
        "xlsx",
        makers.archive(
            {
                "[Content_Types].xml": makers.content_types(
                    "/xl/workbook.xml", "application/vnd.openxmlformats-officedocument.spreadsheetml.sheet.main+xml"
                )
            }
        ),
        "",
        None,
        "unsupported_type",
    ),
    ("odt", makers.archive({"mimetype": "application/vnd.oasis.opendocument.text"}), "", None, "unsupported_type"),
    ("zip", makers.archive({"a.txt": "hello"}), "", None, "unsupported_type"),
    ("rtf", rb"{\rtf1 hello}", "", None, "unsupported_type"),
    ("gzip", gzip.compress(b"hello"), "x.txt", None, "unsupported_type"),
    ("png", b"\x89PNG\r\n\x1a\n" + bytes(100), "", "image/png", "unsupported_type"),
    ("noise", random.Random(3).randbytes(5000), "", None, "unsupported_type"),
    ("text with NULs", b"hello\0world", "x.txt", "text/plain", "bad_encoding"),
    ("Latin-1 declared UTF-8", "Prüfung".encode("latin-1"), "", "text/plain; charset=utf-8", "bad_encoding"),
    ("Shift JIS", "文書を読む".encode("shift_jis"), "", None, "bad_encoding"),
    ("json too deep", b"[" * 100 + b"1" + b"]" * 100, "", None, "bad_document"),
]


@pytest.mark.parametrize(("data", "filename", "declared", "code"), [pytest.param(*row[1:], id=row[0]) for row in REJECTED])
async def test_is_rejected(extractor: Extractor, data: bytes, filename: str, declared: str | None, code: str) -> None:
    assert await code_of(extractor, data, filename, declared) == code


async def test_title_and_headings(extractor: Extractor) -> None:
    word = await extractor.extract(makers.docx(["text"], title="The Title", heading="The Heading"))
    assert (word.title, word.headings) == ("The Title", ["The Heading"])
    pdf = await extractor.extract(makers.pdf(["text"], "The Title"))
    assert (pdf.title, pdf.pages) == ("The Title", 1)
    html = await extractor.extract(b"<html><head><title>The\nTitle</title></head><body><h1>One</h1><h2>Two</h2>text")
    assert (html.title, html.headings) == ("The Title", ["One", "Two"])


async def test_a_cut_is_never_silent(extractor: Extractor) -> None:
    extracted = await extractor.extract(b"x" * 10_000_000)
    assert (len(extracted.text), extracted.outcome, extracted.notes) == (LIMITS.max_chars, "partial", ["truncated"])


async def test_more_bytes_than_allowed_never_reach_a_child() -> None:
    extractor = Extractor(Documents(max_bytes=10))
    assert await code_of(extractor, b"x" * 11) == "doc_too_large"
    assert extractor.status()["zygote_pid"] is None
    await extractor.close()


async def test_a_bad_page_costs_only_itself(extractor: Extractor) -> None:
    good = makers.pdf(["one", "two", "three"])
    extracted = await extractor.extract(good.replace(b"/Type /Page /Parent", b"/Type /Pag3 /Parent", 1))
    assert "two" in extracted.text and "three" in extracted.text


# ── limits ──────────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_finished_pages_outlive_the_deadline() -> None:
    extractor = Extractor(Documents(timeout_s=3.0))
    await extractor.start()
    extracted = await extractor.extract(slow())
    assert extracted.outcome == "partial" and "timeout" in extracted.notes and extracted.pages >= 1
    await until(lambda: not children_of(zygote_of(extractor)))
    await extractor.close()


async def test_no_page_before_the_deadline() -> None:
    extractor = Extractor(Documents(timeout_s=0.5))
    await extractor.start()
    assert await code_of(extractor, makers.operators_pdf(5_000_000)) == "extraction_timeout"
    await extractor.close()


async def test_memory_is_limited() -> None:
    extractor = Extractor(msgspec.structs.replace(LIMITS, memory=256 * MiB))
    await extractor.start()
    assert await code_of(extractor, b"word " * (30 * MiB)) == "extraction_memory"
    assert (await extractor.extract(b"the next one")).text == "the next one"
    await extractor.close()


BOMBS: list[tuple[str, Callable[[], bytes]]] = [
    ("flate, 300 MB", lambda: makers.flate_bomb_pdf(300 * MiB)),
    ("flate in flate, 1 GB", lambda: makers.flate_bomb_pdf(1024 * MiB, 2)),
    ("letters shown 2 million times", lambda: makers.operators_pdf(2_000_000)),
    ("one page 2,000 times", lambda: makers.repeated_page_pdf(2000, 20_000)),
    ("docx of 120 MB", lambda: makers.zip_bomb_docx(120_000_000)),
    ("docx of dense XML", lambda: makers.raw_docx("".join(makers.paragraph(str(i % 7919)) for i in range(200_000)))),
    ("a line of 10 MB", lambda: b"a" * 10_000_000),
    ("open brackets", lambda: b"[" * 2_000_000),
    ("less-than signs", lambda: b"<" * 2_000_000),
    ("html nested a million deep", lambda: b"<html>" + b"<div>" * 1_000_000 + b"x"),
    ("mail nested 1,000 deep", lambda: b"From: a@b\nTo: c@d\n" + b"".join(MULTIPART % (i, i) for i in range(1000))),
    ("a cell that never ends", lambda: b'a,b\n1,2\n3,4\n5,6\n"' + b"x\n" * 500_000),
]


@pytest_asyncio.fixture(loop_scope="module", scope="module")
async def hasty() -> AsyncIterator[Extractor]:
    """Its deadline is short."""
    extractor = Extractor(Documents(timeout_s=4.0))
    await extractor.start()
    yield extractor
    await extractor.close()


@pytest.mark.parametrize("make", [pytest.param(make, id=name) for name, make in BOMBS])
async def test_bombs_end_in_time_and_cost_the_hub_nothing(hasty: Extractor, make: Callable[[], bytes]) -> None:
    data = make()
    before = resident()
    began = asyncio.get_running_loop().time()
    try:
        extracted = await hasty.extract(data)
        assert len(extracted.text) <= LIMITS.max_chars
    except DocumentRejected:
        pass
    assert asyncio.get_running_loop().time() - began < 4 + 6  # the deadline, and what a busy machine adds
    assert resident() - before < len(data) + 48 * MiB
    assert (await hasty.extract(b"the next one")).text == "the next one"


def resident() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────────


async def test_a_killed_zygote_is_started_again(own: Extractor) -> None:
    first = zygote_of(own)
    os.kill(first, signal.SIGKILL)
    assert (await own.extract(b"still here")).text == "still here"
    assert zygote_of(own) != first and own.status()["restarts"] == 1


async def test_a_zygote_killed_under_a_document_costs_a_second_try(own: Extractor) -> None:
    first = zygote_of(own)
    reading = asyncio.create_task(own.extract(makers.operators_pdf(100_000)))
    await until(lambda: children_of(first))
    orphans = children_of(first)
    os.kill(first, signal.SIGKILL)
    assert isinstance(await reading, Extracted)
    await until(lambda: not any(alive(pid) for pid in orphans))


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except (FileNotFoundError, ProcessLookupError):
        return False


async def test_a_killed_child_is_a_crash_and_nothing_else(own: Extractor) -> None:
    zygote = zygote_of(own)
    reading = asyncio.create_task(own.extract(makers.zip_bomb_docx(100), "x.docx"))
    assert (await reading).text
    reading = asyncio.create_task(code_of(own, b"<html>" + b"<p>x</p>" * 10_000_000))
    await until(lambda: children_of(zygote))
    os.kill(children_of(zygote)[0], signal.SIGSEGV)
    assert await reading == "extraction_crashed"
    assert zygote_of(own) == zygote


async def test_only_so_many_children_at_once(own: Extractor) -> None:
    readings = [asyncio.create_task(own.extract(slow())) for _ in range(5)]
    await until(lambda: len(children_of(zygote_of(own))) == LIMITS.workers)
    assert (own.status()["in_flight"], own.status()["waiting"]) == (2, 3)
    for reading in readings:
        reading.cancel()
    assert all(isinstance(end, asyncio.CancelledError) for end in await asyncio.gather(*readings, return_exceptions=True))
    await until(lambda: not children_of(zygote_of(own)))
    assert own.status()["ends"] == {"canceled": 2}
    assert (await own.extract(b"the next one")).text == "the next one"


async def test_many_at_once_are_not_mixed_up(extractor: Extractor) -> None:
    texts = [f"document number {i}" for i in range(40)]
    extracted = await asyncio.gather(*(extractor.extract(makers.pdf([text])) for text in texts))
    assert [each.text for each in extracted] == texts


async def test_close_leaves_nothing_behind() -> None:
    extractor = Extractor(LIMITS)
    await extractor.start()
    zygote = zygote_of(extractor)
    reading = asyncio.create_task(extractor.extract(slow()))
    await until(lambda: children_of(zygote))
    pids = [zygote, *children_of(zygote)]
    await extractor.close()
    await extractor.close()
    assert not any(alive(pid) for pid in pids)
    with pytest.raises(Unavailable, match="extractor_unavailable"):
        await reading
    with pytest.raises(Unavailable, match="extractor_unavailable"):
        await extractor.extract(b"too late")


HUB = """
import asyncio, sys
from hubpeer.documents import Extractor
from hubpeer.settings import Documents
async def main():
    extractor = Extractor(Documents())
    await extractor.start()
    print(extractor.status()["zygote_pid"], flush=True)
    await extractor.extract(sys.stdin.buffer.read())
asyncio.run(main())
"""


async def test_a_killed_hub_leaves_nothing_running() -> None:
    hub = await asyncio.create_subprocess_exec(
        sys.executable, "-c", HUB, stdin=asyncio.subprocess.PIPE, stdout=asyncio.subprocess.PIPE
    )
    assert hub.stdin and hub.stdout
    zygote = int(await hub.stdout.readline())
    hub.stdin.write(slow())
    hub.stdin.write_eof()
    await until(lambda: children_of(zygote))
    pids = [zygote, *children_of(zygote)]
    hub.kill()
    await hub.wait()
    await until(lambda: not any(alive(pid) for pid in pids))


async def test_an_interrupt_is_not_for_the_zygote(own: Extractor) -> None:
    os.kill(zygote_of(own), signal.SIGINT)
    assert (await own.extract(b"still here")).text == "still here"
    assert own.status()["restarts"] == 0


async def test_random_damage(own: Extractor) -> None:
    """Real documents with random bytes broken: text or one code, never a hang, never a dead zygote."""
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    dice = random.Random(seed)
    originals = [makers.pdf(["one", "two"]), makers.docx(["one"]), makers.eml("one", "two"), makers.encrypted_pdf("one", "")]
    for _ in range(60):
        data = bytearray(dice.choice(originals))
        for _ in range(dice.randrange(1, 20)):
            data[dice.randrange(len(data))] = dice.randrange(256)
        del data[dice.randrange(len(data) // 2, len(data)) :]
        with suppress(DocumentRejected):
            assert isinstance(await own.extract(bytes(data) or b"x"), Extracted)
    assert own.status()["restarts"] == 0
