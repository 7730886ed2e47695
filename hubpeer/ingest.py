"""The story of a document: bytes in, a record and a receipt out. Read `Ingest.keep` from top to bottom.

Two words, never mixed: *accepted* (the PubAck of `hub.docs.stream.<client>`: the bytes are in JetStream) and *committed* (the
receipt: the document is in the client's store, on disk). The order is store, receipt, acknowledge:

1. killed before the commit:  the stream delivers the document again, or the asker gets no reply and sends it again;
2. killed before the receipt: the same, and the store knows the bytes: the same document, `duplicate`;
3. killed before the ack:     the same, and the receipt is published a second time.

Every document ends in one terminal state: `categorized`, or `failed` with a coded reason.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
import re
import time
from collections import Counter
from collections.abc import Callable
from typing import TYPE_CHECKING

from msgspec import UNSET, Struct

from hubpeer import plan, taxonomy, wire
from hubpeer.bus.jetstream import ApiError, JetStream, Message, Puller
from hubpeer.bus.link import Link
from hubpeer.bus.service import Endpoint, Reply, Request
from hubpeer.bus.topology import DOCS, DOCS_CONSUMER
from hubpeer.deadletter import DeadLetters
from hubpeer.documents import Extractor
from hubpeer.errors import BadRequest, DocumentRejected, HubError, shown
from hubpeer.model import DocAsk, Model
from hubpeer.roster import Roster
from hubpeer.settings import Settings
from hubpeer.store import Draft, Stored, Stores
from hubpeer.wire import Categorization, Document, FailedReceipt, Headers, Receipt

if TYPE_CHECKING:  # numpy is loaded only where the encoder is used
    from hubpeer.encoder import BuiltIn

log = logging.getLogger("hubpeer.ingest")

_sha256 = re.compile(r"[0-9a-fA-F]{64}")
#: Reasons that may not hold another time: the same bytes are read again.
_WORTH_ANOTHER_TRY = frozenset({"extraction_timeout", "extraction_memory", "extraction_crashed"})
#: Reasons to wait for as long as it takes.
_PASSES = frozenset({"store_full", "queue_full", "bus_unavailable"})


class Incoming(Struct, frozen=True):
    """One document as it arrived: its bytes and what its publisher says of it."""

    client: str
    data: bytes
    filename: str = ""
    declared: str | None = None
    source_id: str | None = None
    sha256: str | None = None  #: as the publisher computed it

    @staticmethod
    def read(client: str, data: bytes, headers: Headers) -> Incoming:
        """Check the headers. Raises `bad_header`."""
        claimed = wire.header(headers, wire.SHA256, 64)
        if claimed is not None and not _sha256.fullmatch(claimed):
            raise BadRequest("bad_header", f"{wire.SHA256} is 64 hex digits", field=wire.SHA256)
        return Incoming(
            client,
            data,
            plan.clean(wire.header(headers, wire.FILENAME, 512) or "", 255),
            wire.header(headers, wire.CONTENT_TYPE, 255),
            wire.header(headers, wire.SOURCE_ID) or None,
            claimed.lower() if claimed else None,
        )


class Ingest:
    """Reads, keeps and categorizes documents, and answers what is asked of them."""

    def __init__(
        self,
        settings: Settings,
        link: Link,
        js: JetStream,
        stores: Stores,
        extractor: Extractor,
        model: Model | None,
        encoder: BuiltIn | None,
        roster: Roster,
        letters: DeadLetters,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._settings = settings
        self._link = link
        self._js = js
        self._stores = stores
        self._extractor = extractor
        self._model = model
        self._encoder = encoder
        self._roster = roster
        self._letters = letters
        self._clock = clock
        self._taxonomy = settings.taxonomy or taxonomy.DEFAULT
        self._to_categorize: asyncio.Queue[tuple[str, str, int]] = asyncio.Queue()
        self._waiting: dict[tuple[str, str, int], asyncio.Event] = {}
        self.counts: Counter[str] = Counter()

    # ── hub.docs.ingest ─────────────────────────────────────────────────────────────────────────────────────────────

    async def answer(self, request: Request) -> Reply:
        """`hub.docs.ingest.<client>`: one document inline or by reference; the reply is the receipt, after the commit."""
        client = wire.client_token(request.tokens[3])
        if (named := wire.header(request.headers, wire.CLIENT, 64)) is not None and named != client:
            raise BadRequest(
                "identity_mismatch", f"the subject says {client}, {wire.CLIENT} {shown(named)!r}", field=wire.CLIENT
            )
        return await self._ingest(client, request)

    async def answer_bare(self, request: Request) -> Reply:
        """`hub.docs.ingest` with the client in `Hub-Client`, where the operator grants it."""
        if not self._settings.nats.bare_ingest:
            raise BadRequest("client_not_named", f"use {wire.DOCS_INGEST}.<client>: here the subject names the client")
        named = wire.header(request.headers, wire.CLIENT, 64)
        if named is None:
            raise BadRequest(
                "client_not_named", f"say whose document it is: header {wire.CLIENT}, or {wire.DOCS_INGEST}.<client>"
            )
        return await self._ingest(wire.client_token(named), request)

    async def _ingest(self, client: str, request: Request) -> Reply:
        wait = wire.header(request.headers, wire.WAIT, 32)
        if wait not in (None, "committed", "categorized"):
            raise BadRequest("bad_header", f"{wire.WAIT} is committed or categorized", field=wire.WAIT)
        document = await self._incoming(client, request.data, request.headers)
        stored, duplicate = await self.keep(document)
        await self._unstage(client, request.headers)
        if wait == "categorized":
            await self._categorized(stored, request.deadline)
            stored = await self._stores.get(client, stored.document_id)
        return Reply(wire.encode(receipt(stored, duplicate)))

    async def _incoming(self, client: str, data: bytes, headers: Headers) -> Incoming:
        """The document a message carries or refers to (`Hub-Object`: an object of the bucket `DOCS_<client>`)."""
        name = wire.header(headers, wire.OBJECT, 255)
        if name is not None:
            if data:
                raise BadRequest("bad_header", f"{wire.OBJECT} goes with an empty body", field=wire.OBJECT)
            limit = self._settings.documents.max_bytes
            data = await self._js.object_get(wire.object_bucket(client), name, limit)
        return Incoming.read(client, data, headers)

    async def _unstage(self, client: str, headers: Headers) -> None:
        """Remove the staged object of a document that is committed; the store has its bytes now."""
        if name := wire.header(headers, wire.OBJECT, 255):
            await self._js.object_delete(wire.object_bucket(client), name)

    # ── the story ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def keep(self, document: Incoming) -> tuple[Stored, bool]:
        """Read one document and keep it; returns what is in the store, and whether it was there before.

        After this returns, the document is on disk and its receipt is in the stream RECEIPTS. Raises `DocumentRejected` once
        the reason is kept, `StoreError`, `Unavailable`, `Busy`.
        """
        sha256 = hashlib.sha256(document.data).hexdigest()
        known = await self._stores.find(document.client, sha256, document.source_id)
        if known is not None and known.state != "failed":
            self.counts["duplicate"] += 1
            await self._publish_receipt(known, duplicate=True)
            return known, True
        if known is not None and known.error is not None and known.error["code"] not in _WORTH_ANOTHER_TRY:
            raise await self._refused(known, document)

        received_at = wire.iso(self._clock())
        try:
            if document.sha256 not in (None, sha256):
                raise DocumentRejected("digest_mismatch", f"{wire.SHA256} does not match the bytes that arrived")
            extracted = await self._extractor.extract(document.data, document.filename, document.declared)
        except DocumentRejected as exc:
            if exc.code == "digest_mismatch":  # these bytes are not the document; they say nothing about it
                raise
            why = await self._stores.reject(
                document.client, sha256, len(document.data), document.filename, document.source_id, received_at,
                exc.code, exc.message,
            )  # fmt: skip
            raise await self._refused(why, document) from None

        draft = Draft(
            filename=document.filename,
            media_type=extracted.media_type,
            received_at=received_at,
            declared_type=document.declared,
            source_id=document.source_id,
            title=extracted.title,
            pages=extracted.pages,
            extraction=extracted.outcome,
            notes=extracted.notes,
            engine=extracted.engine,
            headings=extracted.headings,
        )
        put = await self._stores.put(document.client, draft, document.data, extracted.text)
        self.counts["duplicate" if put.duplicate else "committed"] += 1
        await self._publish_receipt(put.stored, put.duplicate)
        if put.stored.state == "committed" and not put.duplicate:
            self._to_categorize.put_nowait((put.stored.client, put.stored.document_id, put.stored.version))
        return put.stored, put.duplicate

    async def _refused(self, why: Stored, document: Incoming) -> DocumentRejected:
        """The error of a document that is no document, with its failed receipt published."""
        assert why.error is not None
        self.counts[f"refused_{why.error['code']}"] += 1
        error = DocumentRejected(why.error["code"], why.error["message"])
        error.document_id = why.document_id
        await self._publish_failure(error, why.client, why.document_id, why.sha256, document)
        return error

    # ── receipts ────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _publish_receipt(self, stored: Stored, duplicate: bool) -> None:
        data = wire.encode(receipt(stored, duplicate))
        await self._publish(stored.client, stored.document_id, data, f"{stored.version}.{stored.state}")

    async def _publish_failure(
        self, error: HubError, client: str, document_id: str, sha256: str, document: Incoming | None
    ) -> None:
        failed = FailedReceipt(
            document_id=document_id,
            sha256=sha256,
            error=wire.error_body(error, document_id),
            client=client,
            source_id=document.source_id or UNSET if document else UNSET,
            filename=document.filename or UNSET if document else UNSET,
        )
        await self._publish(client, document_id, wire.encode(failed), "failed")

    async def _publish(self, client: str, document_id: str, data: bytes, what: str) -> None:
        # The time is part of the message id: a resend within the duplicate window is told again what became of it.
        msg_id = f"{client}.{document_id}.{what}.{int(self._clock() * 1000)}"
        await self._js.publish(wire.receipt_subject(client, document_id), data, msg_id=msg_id)

    # ── hub.docs.stream ─────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Take documents from the stream, and categorize what is committed, until canceled."""
        for waiting in await self._stores.pending():
            self._to_categorize.put_nowait(waiting)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._categorize_all(), name="categorize")
            async with Puller(self._link, DOCS, DOCS_CONSUMER) as puller:
                await puller.feed(self._take, self._settings.documents.workers + 1, tasks.create_task)

    async def _take(self, message: Message) -> None:
        """One streamed document, to its receipt; then, and only then, the ack."""
        try:
            async with message.kept_alive(every_s=10):
                client = wire.client_token(message.subject.split(".")[3])
                document = await self._incoming(client, message.data, message.headers)
                try:
                    await self.keep(document)
                except DocumentRejected as exc:
                    if exc.document_id is None:  # nothing was kept, so the message itself is
                        raise
                await message.ack()
                await self._unstage(client, message.headers)
        except (BadRequest, DocumentRejected) as exc:
            await self._bury(message, exc)
        except HubError as exc:
            await self._again(message, exc)
        except Exception as exc:
            log.exception("document %d of %s failed", message.sequence, DOCS)
            await self._again(message, exc)

    async def _again(self, message: Message, exc: Exception) -> None:
        """Not this time: hand it back with a growing delay, or bury it when it has had its tries.

        A full disk, a full queue and an absent bus pass, and are nobody's fault: they do not count as tries. A client's own
        quota does not pass by itself, and documents that wait for it would hold up other clients': they are told at once.
        """
        code = exc.code if isinstance(exc, HubError) else "internal"
        patient = code in _PASSES and not isinstance(exc, ApiError)
        log.warning("document %d of %s waits (%d. try): %s", message.sequence, DOCS, message.deliveries, exc)
        try:
            if code == "quota_exceeded" or (not patient and message.deliveries >= self._settings.documents.max_deliver):
                await self._bury(message, exc)
            else:
                await message.nak(min(60.0, 2.0 ** min(message.deliveries, 6)))
        except HubError as failed:
            log.warning("it is delivered again after its ack wait: %s", failed)

    async def _bury(self, message: Message, exc: Exception) -> None:
        error = exc if isinstance(exc, HubError) else HubError("internal", f"failed {message.deliveries} times")
        self.counts[f"buried_{error.code}"] += 1
        try:
            await self._letters.bury(message, error)
            client = message.subject.split(".")[3]
            if wire.TOKEN.fullmatch(client):
                sha256 = hashlib.sha256(message.data).hexdigest()
                await self._publish_failure(error, client, f"dlq-{message.sequence}", sha256, None)
        except HubError as failed:
            log.warning("document %d of %s cannot be buried yet: %s", message.sequence, DOCS, failed)

    # ── categories ──────────────────────────────────────────────────────────────────────────────────────────────────

    async def _categorize_all(self) -> None:
        while True:
            client, document_id, version = waiting = await self._to_categorize.get()
            try:
                await self._categorize(client, document_id, version)
            except HubError as exc:
                log.warning("document %s of %s is not categorized: %s", document_id, client, exc)
                if exc.status in (429, 503):
                    asyncio.get_running_loop().call_later(5, self._to_categorize.put_nowait, waiting)
            except Exception:
                log.exception("document %s of %s is not categorized", document_id, client)

    async def _categorize(self, client: str, document_id: str, version: int) -> None:
        """Ask the model, or the rules where it has no answer; keep it, tell it."""
        try:
            stored, text, _ = await self._stores.text(client, document_id, 0, self._settings.documents.max_chars)
        except BadRequest as exc:
            if exc.code == "not_found":  # deleted meanwhile
                return
            raise
        if stored.version == version and stored.state == "committed":
            found = await self._ask(stored, text)
            kept = await self._stores.categorize(client, document_id, version, found)
            if kept is not None:
                self.counts[f"categorized_{found.method}"] += 1
                await self._publish_receipt(kept, duplicate=False)
        if event := self._waiting.pop((client, document_id, version), None):
            event.set()

    async def _ask(self, stored: Stored, text: str) -> Categorization:
        names = sorted(self._roster.states())
        ask = DocAsk(stored.client, text, self._taxonomy, names, stored.title or "", stored.filename, stored.headings)
        if self._model is not None:
            try:
                return await self._model.categorize(ask, None)
            except HubError as exc:
                self.counts[f"not_by_model_{exc.code}"] += 1
                log.warning("document %s: the model did not categorize: %s", stored.document_id, exc)
        if self._encoder is not None:
            return await asyncio.to_thread(self._encoder.categorize, ask)
        return await asyncio.to_thread(
            taxonomy.by_rules, text, stored.title or "", stored.filename, stored.headings, self._taxonomy, names
        )

    async def _categorized(self, stored: Stored, deadline: float | None) -> None:
        """Wait until this version is categorized, or until just before the asker stops waiting."""
        if stored.state != "committed":
            return
        key = (stored.client, stored.document_id, stored.version)
        event = self._waiting.setdefault(key, asyncio.Event())
        if (await self._stores.get(stored.client, stored.document_id)).state != "committed":
            self._waiting.pop(key, None)
            return
        patience = 300.0 if deadline is None else max(0.0, deadline - self._clock() - 0.1)
        try:
            await asyncio.wait_for(event.wait(), patience)
        except TimeoutError:
            log.info("document %s is committed; its category comes later", stored.document_id)

    @property
    def uncategorized(self) -> int:
        return self._to_categorize.qsize()

    # ── hub.docs.<verb>.<client> ────────────────────────────────────────────────────────────────────────────────────

    def endpoints(self) -> list[Endpoint]:
        ingest = {
            "response_schema": "hub.schema.doc_receipt",
            "example": 'nats req hub.docs.ingest.acme -H Hub-Filename:note.txt "..."',
        }
        # The subject names the owner of the documents; who asks may be any agent that the operator lets, with its own inbox.
        verbs = {"get": self._get, "text": self._text, "list": self._list, "delete": self._delete, "stats": self._stats}
        return [
            Endpoint("docs-ingest", f"{wire.DOCS_INGEST}.*", self.answer, metadata=ingest),
            Endpoint("docs-ingest-bare", wire.DOCS_INGEST, self.answer_bare, metadata=ingest),
            *(Endpoint(f"docs-{verb}", f"hub.docs.{verb}.*", handler) for verb, handler in verbs.items()),
        ]

    async def _get(self, request: Request) -> Reply:
        client, body = _client(request), wire.decode(wire.DocQuery, request.data)
        stored = await self._stores.get(client, wire.id_token(body.document_id, "bad_doc_id"))
        return Reply(wire.encode(wire.DocReply(document(stored))))

    async def _text(self, request: Request) -> Reply:
        client, body = _client(request), wire.decode(wire.TextQuery, request.data)
        document_id = wire.id_token(body.document_id, "bad_doc_id")
        stored, text, total = await self._stores.text(client, document_id, body.offset, body.limit)
        # A page of the asked length may not fit into a message (four bytes a character, or many escapes): give less.
        while len(encoded := wire.encode(_page(stored, text, body.offset, total))) > self._link.max_payload - 1024:
            text = text[: len(text) // 2]
        return Reply(encoded)

    async def _list(self, request: Request) -> Reply:
        client, body = _client(request), wire.decode(wire.DocList, request.data)
        limit = body.limit
        while True:
            found, total, after = await self._stores.list(client, body.category, body.state, limit, body.after)
            encoded = wire.encode(wire.DocListReply([document(stored) for stored in found], total, after))
            if len(encoded) <= self._link.max_payload - 1024 or limit == 1:
                return Reply(encoded)
            limit //= 2

    async def _delete(self, request: Request) -> Reply:
        client, body = _client(request), wire.decode(wire.DocQuery, request.data)
        document_id = wire.id_token(body.document_id, "bad_doc_id")
        if not await self._stores.delete(client, document_id):
            raise BadRequest("not_found", f"{client} has no document {document_id}")
        self.counts["deleted"] += 1
        return Reply(wire.encode(wire.DeleteReply(document_id, deleted=True)))

    async def _stats(self, request: Request) -> Reply:
        client = _client(request)
        wire.decode(wire.Nothing, request.data)
        return Reply(wire.encode(await self._stores.stats(client)))


def _client(request: Request) -> str:
    return wire.client_token(request.tokens[3])


def _page(stored: Stored, text: str, offset: int, total: int) -> wire.TextReply:
    end = offset + len(text)
    return wire.TextReply(stored.document_id, stored.version, text, offset, total, end if end < total and text else None)


def receipt(stored: Stored, duplicate: bool) -> Receipt:
    return Receipt(
        document_id=stored.document_id,
        sha256=stored.sha256,
        version=stored.version,
        duplicate=duplicate,
        state=stored.state,
        client=stored.client,
        source_id=stored.source_id if stored.source_id is not None else UNSET,
        filename=stored.filename or UNSET,
        categorization=stored.categorization if stored.categorization is not None else UNSET,
    )


def document(stored: Stored) -> Document:
    """A stored document as it is shown: every field of `Document`, which are fields of `Stored` too."""
    return Document(**{name: getattr(stored, name) for name in Document.__struct_fields__})
