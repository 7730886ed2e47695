"""The hub's side of reading documents: one call per document, a deadline, and a zygote that is started again when it dies."""

from __future__ import annotations

import asyncio
import os
import signal
import socket
import subprocess
import sys
from collections import Counter
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any, Final, Literal

import msgspec

from hubpeer.documents.parts import (
    MAX_HEADINGS,
    MAX_NOTES,
    MEDIA_TYPES,
    PDF,
    TEXT,
    BadFrame,
    Deframer,
    Part,
    Task,
    clean,
    one_line,
    rejected,
)
from hubpeer.errors import STATUS, DocumentRejected, Unavailable
from hubpeer.settings import Documents

#: How long a zygote may take to load its libraries, and to end.
START_S: Final = 60.0
STOP_S: Final = 5.0
#: How long a killed child may take to be gone, its last words and its exit status included.
DRAIN_S: Final = 5.0
#: Bytes given to a document in one go, so that the event loop turns in between; and taken from a child in one read.
SLICE: Final = 4 * 1024 * 1024
READ: Final = 256 * 1024


class Extracted(msgspec.Struct, frozen=True):
    """A document's text and what was learnt on the way.

    `media_type` is what the content is, whatever was declared. `text` has no NUL, no lone surrogate and no control character
    but newline and tab. `pages`: pages read; 1 for formats without pages. `outcome` is `partial` where something of the
    document is missing; `notes` then say what, in stable words: `truncated`, `timeout`, `pages_failed:3`, or an error's code.
    """

    media_type: str
    text: str
    title: str | None
    pages: int
    outcome: Literal["ok", "partial"]
    engine: str
    notes: list[str]
    headings: list[str]


class _ZygoteGone(Exception):
    """The zygote died while a document was being read."""


class _Zygote:
    """A running zygote process and the socket it takes documents from."""

    def __init__(self) -> None:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-s", "-m", "hubpeer.documents.zygote", str(os.getpid())],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                cwd="/",
                env={"PYTHONPATH": str(Path(__file__).parents[2]), "LC_ALL": "C.UTF-8"},
                start_new_session=True,  # a Ctrl-C in the terminal is for the hub
            )
        ours.setblocking(False)
        self.socket = ours
        self.protections: list[str] = []

    async def ready(self) -> None:
        """Wait until it takes documents. Raises `Unavailable` where it does not within `START_S`."""
        greeting = b""
        with suppress(TimeoutError, OSError):
            async with asyncio.timeout(START_S):
                greeting = await asyncio.get_running_loop().sock_recv(self.socket, READ)
        if not greeting:
            raise Unavailable("extractor_unavailable", "the process that reads documents does not start")
        self.protections = msgspec.json.decode(greeting, type=list[str])

    def send(self, task: Task, descriptors: list[int]) -> None:
        try:
            socket.send_fds(self.socket, [msgspec.json.encode(task)], descriptors)
        except OSError as exc:  # gone, or not reading: a packet always fits otherwise
            raise _ZygoteGone from exc

    async def stop(self) -> None:
        """End it and all its children, and wait for that."""
        self.socket.close()
        try:
            await asyncio.to_thread(self.process.wait, STOP_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            await asyncio.to_thread(self.process.wait)


class _Harvest:
    """What one child said, gathered under the hub's own caps."""

    def __init__(self, limits: Documents) -> None:
        self._max_chars = limits.max_chars
        # Four bytes a character at worst, and a frame around each page and slice.
        self._deframer = Deframer(5 * limits.max_chars + 16 * limits.max_pages + READ)
        self._text: list[str] = []
        self.media_type = TEXT
        self.engine = ""
        self.title: str | None = None
        self.notes: list[str] = []
        self.headings: list[str] = []
        self.pages = 0
        self.chars = 0
        self.finished = False
        self.failure: DocumentRejected | None = None  # why it ended early

    def take(self, data: bytes) -> None:
        """Raises `BadFrame`."""
        for part in self._deframer.feed(data):
            self._take(part)

    def _take(self, part: Part) -> None:
        match part.kind:
            case "page":
                self.pages += 1
                self._add(part.text, "\n\n" if self._text else "")
            case "text":
                self._add(part.text)
            case "type" if part.text in MEDIA_TYPES:
                self.media_type = part.text
            case "engine":
                self.engine = one_line(part.text)
            case "title":
                self.title = one_line(part.text) or None
            case "heading":
                heading = one_line(part.text)
                if heading and len(self.headings) < MAX_HEADINGS:
                    self.headings.append(heading)
            case "note":
                self.note(one_line(part.text))
            case "rejected" if part.code in STATUS:
                self.failure = DocumentRejected(part.code, one_line(part.text))
            case "end":
                self.finished = True
            case _:
                raise BadFrame("an unknown media type or code")

    def _add(self, text: str, before: str = "") -> None:
        if text:
            self.chars += len(text)
            if self.chars > self._max_chars:
                raise BadFrame("more text than was asked for")
            self._text += before, clean(text)

    def note(self, word: str) -> None:
        if word not in self.notes and len(self.notes) < MAX_NOTES:
            self.notes.append(word)

    def result(self) -> Extracted:
        """Raises `DocumentRejected` where there is no text."""
        text = "".join(self._text).strip()
        if not text:
            raise self.failure or rejected("no_text")
        if self.failure:
            self.note(self.failure.code.removeprefix("extraction_"))
        partial = self.failure or any(note.startswith(("truncated", "pages_failed")) for note in self.notes)
        return Extracted(
            media_type=self.media_type,
            text=text,
            title=self.title,
            pages=max(1, self.pages),
            outcome="partial" if partial else "ok",
            engine=self.engine,
            notes=self.notes,
            headings=self.headings,
        )


class Extractor:
    """Reads documents in child processes: fork per document from a warm parent, with limits, killed at the deadline.

    One document costs some 5 ms more than reading it in the hub itself would, and for that can break nothing: not the hub,
    not another document, not a file, not a peer on the network.
    """

    def __init__(self, limits: Documents) -> None:
        self._limits = limits
        self._slots = asyncio.Semaphore(limits.workers)
        self._starting = asyncio.Lock()
        self._zygote: _Zygote | None = None
        self._closed = False
        self._in_flight = 0
        self._waiting = 0
        self._starts = 0
        self._ends: Counter[str] = Counter()

    async def start(self) -> None:
        """Start the zygote; `extract` does so too where it must. Raises `Unavailable`."""
        await self._running()

    async def close(self) -> None:
        """End the zygote and every child; whoever still waits for a document gets `Unavailable`. Harmless when repeated."""
        self._closed = True
        async with self._starting:
            if self._zygote is not None:
                zygote, self._zygote = self._zygote, None
                await zygote.stop()

    def status(self) -> dict[str, Any]:
        zygote = self._zygote
        return {
            "zygote_pid": zygote.process.pid if zygote else None,
            "restarts": max(0, self._starts - 1),
            "in_flight": self._in_flight,
            "waiting": self._waiting,
            "ends": dict(self._ends),
            "protections": zygote.protections if zygote else [],
        }

    async def extract(self, data: bytes, filename: str = "", declared: str | None = None) -> Extracted:
        """The text of one document, within `timeout_s` of its turn.

        `filename` and `declared` (a content type) decide only between text formats that look alike. Raises `DocumentRejected`,
        which is final, and `Unavailable("extractor_unavailable")`, after which the same document may succeed.
        """
        if not data:
            raise DocumentRejected("empty_document", "the document is empty")
        if len(data) > self._limits.max_bytes:
            raise DocumentRejected("doc_too_large", f"a document may be {self._limits.max_bytes} bytes at most")
        self._waiting += 1
        try:
            await self._slots.acquire()
        finally:
            self._waiting -= 1
        self._in_flight += 1
        end = "canceled"
        try:
            extracted = await self._read(data, self._task(filename, declared))
            end = extracted.outcome
            return extracted
        except (DocumentRejected, Unavailable) as exc:
            end = exc.code
            raise
        finally:
            self._ends[end] += 1
            self._in_flight -= 1
            self._slots.release()

    def _task(self, filename: str, declared: str | None) -> Task:
        return Task(
            filename=clean(filename)[-256:],
            declared=clean(declared or "")[:256],
            max_pages=self._limits.max_pages,
            max_chars=self._limits.max_chars,
            memory=self._limits.memory,
            # The wall clock is the hub's; this is for a hub that is stopped itself. Never less than the wall allows.
            cpu_s=int(self._limits.timeout_s) + 2,
        )

    async def _read(self, data: bytes, task: Task) -> Extracted:
        """One document, with a second engine if need be, all within one deadline."""
        clock = asyncio.get_running_loop().time
        began = clock()
        harvest = await self._harvest(data, task, self._limits.timeout_s)
        broken = harvest.failure is not None and harvest.failure.code in ("extraction_crashed", "extraction_memory")
        if broken and harvest.media_type == PDF:
            # pdfium is C++ and reads more; pypdf is Python with limits of its own. What breaks one, the other may read.
            left = self._limits.timeout_s - (clock() - began)
            second = await self._harvest(data, msgspec.structs.replace(task, pdf_engine="pypdf"), left)
            if second.chars >= harvest.chars:
                harvest = second
        return harvest.result()

    async def _harvest(self, data: bytes, task: Task, seconds: float) -> _Harvest:
        """One child's work; a second child's where the zygote died under the first."""
        with suppress(_ZygoteGone):
            return await self._child(await self._running(), data, task, seconds)
        try:
            return await self._child(await self._running(), data, task, seconds)
        except _ZygoteGone:
            raise Unavailable("extractor_unavailable", "the process that reads documents died twice") from None

    async def _running(self) -> _Zygote:
        """The zygote, started where there is none or where it has died."""
        async with self._starting:
            if self._closed:
                raise Unavailable("extractor_unavailable", "the hub is closing")
            if self._zygote is not None and self._zygote.process.poll() is None:
                return self._zygote
            if self._zygote is not None:
                self._zygote.socket.close()
            zygote = self._zygote = _Zygote()
            self._starts += 1
            try:
                await zygote.ready()
            except BaseException:
                self._zygote = None
                zygote.process.kill()
                await zygote.stop()
                raise
            return zygote

    async def _child(self, zygote: _Zygote, data: bytes, task: Task, seconds: float) -> _Harvest:
        """Have one child read `data`, and gather what it says until it has ended. Raises `_ZygoteGone`.

        However this is left, closing the lifeline kills the child.
        """
        harvest = _Harvest(self._limits)
        with ExitStack() as ours:
            output, its_output = _pair(ours)
            lifeline, its_lifeline = _pair(ours)
            document = os.memfd_create("document")
            ours.callback(os.close, document)
            with its_output, its_lifeline:
                await _fill(document, data)
                zygote.send(task, [document, its_output.fileno(), its_lifeline.fileno()])
            late = False
            try:
                async with asyncio.timeout(seconds):
                    await _gather(output, harvest)
            except TimeoutError:
                late = True
                lifeline.shutdown(socket.SHUT_WR)
            except BadFrame:
                lifeline.shutdown(socket.SHUT_WR)
            status = b""
            with suppress(TimeoutError, OSError, BadFrame):
                async with asyncio.timeout(DRAIN_S):
                    if late:  # what it had finished is in the socket still
                        await _gather(output, harvest)
                    status = await asyncio.get_running_loop().sock_recv(lifeline, 4)
        if not status:
            zygote.process.kill()  # dead already, or it does nothing any more
            raise _ZygoteGone
        if not harvest.finished and harvest.failure is None:
            harvest.failure = rejected("extraction_timeout" if late else _cause(status))
        return harvest


def _cause(status: bytes) -> str:
    """The code for a child that ended by itself in the middle of a document, from its wait status."""
    number = int.from_bytes(status, sys.byteorder)
    if os.WIFSIGNALED(number) and os.WTERMSIG(number) == signal.SIGXCPU:
        return "extraction_timeout"
    return "extraction_crashed"


def _pair(stack: ExitStack) -> tuple[socket.socket, socket.socket]:
    """A pair of sockets: ours, which does not block and which `stack` closes, and the child's."""
    ours, theirs = socket.socketpair()
    ours.setblocking(False)
    return stack.enter_context(ours), theirs


async def _fill(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view[:SLICE]) :]
        await asyncio.sleep(0)
    os.lseek(descriptor, 0, os.SEEK_SET)


async def _gather(output: socket.socket, harvest: _Harvest) -> None:
    """Take what the child writes until it closes its end. Raises `BadFrame`."""
    loop = asyncio.get_running_loop()
    while said := await loop.sock_recv(output, READ):
        harvest.take(said)
