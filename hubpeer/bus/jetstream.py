"""JetStream as hubpeer uses it: explicit configuration, publishing that retries, pulling, a key-value bucket, objects.

Everything goes through the JSON API (`$JS.API...`) directly. nats-py's own classes lose configuration fields on a round trip
through their dataclasses, and its watchers and object reads rest on ordered consumers that break under ack format v2.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import logging
import secrets
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, Final

import msgspec
from msgspec import Struct
from nats.aio.msg import Msg

from hubpeer.bus.link import Link
from hubpeer.errors import DocumentRejected, HubError, SettingsError, Unavailable
from hubpeer.wire import MSG_ID, Headers, encode_any

log = logging.getLogger("hubpeer.bus")

NS: Final = 1_000_000_000
EXPECTED_LAST_SUBJECT: Final = "Nats-Expected-Last-Subject-Sequence"

#: Server error codes (nats-server `errors.json`) we act on.
NO_STREAM: Final = 10059
NO_CONSUMER: Final = 10014
NO_MESSAGE: Final = 10037
NOT_ENABLED: Final = 10039
WRONG_LAST_SEQUENCE: Final = 10071
STREAM_FULL: Final = 10077

#: A difference in one of these means the stream is not ours to use; in any other, it is reported and lived with.
_VITAL: Final = frozenset({"subjects", "retention", "storage"})


class ApiError(Unavailable):
    """The JetStream API said no. `err_code` is the contract, the text is not (ADR-7)."""

    def __init__(self, err_code: int, description: str) -> None:
        self.err_code = err_code
        super().__init__("bus_unavailable", f"JetStream: {description} ({err_code})")


class Ack(Struct, frozen=True):
    """A PubAck: the message is in `stream` at `seq`."""

    stream: str
    seq: int
    duplicate: bool = False


class Difference(Struct, frozen=True):
    """Where what is on the server differs from what we would create."""

    what: str  # "stream PLANS", "consumer PLANS/finance"
    field: str
    ours: Any
    theirs: Any

    def __str__(self) -> str:
        return f"{self.what}: {self.field} is {self.theirs!r} on the server, {self.ours!r} here"


class JetStream:
    """The JetStream API over one link."""

    def __init__(self, link: Link) -> None:
        self.link = link

    async def api(self, subject: str, body: dict[str, Any] | None = None, timeout_s: float = 5.0) -> dict[str, Any]:
        """One `$JS.API` call. Raises `ApiError`, or what `Link.request` raises."""
        msg = await self.link.request(f"$JS.API.{subject}", encode_any(body) if body is not None else b"", timeout_s=timeout_s)
        return _answer(msg.data)

    # ── configuration: create what is missing, compare what is there, rewrite nothing ────────────────────────────────

    async def ensure_stream(self, config: dict[str, Any]) -> list[Difference]:
        """Create the stream, or compare it field by field. Raises `SettingsError` where it is another kind of stream."""
        name = config["name"]
        try:
            info = await self.api(f"STREAM.INFO.{name}")
        except ApiError as exc:
            if exc.err_code != NO_STREAM:
                raise
            try:
                await self.api(f"STREAM.CREATE.{name}", config, timeout_s=10)
            except ApiError as created:
                raise SettingsError(f"stream {name} cannot be created: {created}") from created
            return []
        found = _compare(f"stream {name}", config, info["config"])
        if vital := [d for d in found if d.field in _VITAL]:
            raise SettingsError(f"{vital[0]}; remove or rename that stream, or point hubpeer at another server")
        return found

    async def ensure_consumer(self, stream: str, config: dict[str, Any]) -> list[Difference]:
        """The same for a durable consumer."""
        name = config["durable_name"]
        try:
            info = await self.api(f"CONSUMER.INFO.{stream}.{name}")
        except ApiError as exc:
            if exc.err_code != NO_CONSUMER:
                raise
            body = {"stream_name": stream, "config": config, "action": "create"}
            await self.api(f"CONSUMER.CREATE.{stream}.{name}.{config['filter_subject']}", body)
            return []
        return _compare(f"consumer {stream}/{name}", config, info["config"])

    async def stream_state(self, stream: str) -> dict[str, Any]:
        """`state` of STREAM.INFO: messages, bytes, first_seq, last_seq, ..."""
        state: dict[str, Any] = (await self.api(f"STREAM.INFO.{stream}"))["state"]
        return state

    async def subjects(self, stream: str, pattern: str) -> list[str]:
        """The subjects of a stream that match `pattern`, page by page."""
        found: list[str] = []
        while True:
            info = await self.api(f"STREAM.INFO.{stream}", {"subjects_filter": pattern, "offset": len(found)})
            page = info["state"].get("subjects") or {}
            found += page
            if not page or len(found) >= info.get("total", len(found)):
                return found

    async def last(self, stream: str, subject: str) -> tuple[bytes, int, dict[str, str]] | None:
        """The newest message of a subject (data, stream sequence, headers), read from the leader; None where there is none."""
        try:
            answer = await self.api(f"STREAM.MSG.GET.{stream}", {"last_by_subj": subject})
        except ApiError as exc:
            if exc.err_code == NO_MESSAGE:
                return None
            raise
        message = answer["message"]
        return base64.b64decode(message.get("data", "")), message["seq"], _headers(base64.b64decode(message.get("hdrs", "")))

    # ── publishing ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def publish(
        self,
        subject: str,
        data: bytes,
        headers: Headers | None = None,
        msg_id: str | None = None,
        expect_last: int | None = None,
        within_s: float = 10.0,
    ) -> Ack:
        """Publish into a stream and wait for the PubAck.

        A lost leader or a lost ack is retried for `within_s` seconds; `msg_id` or `expect_last` (the subject's last sequence,
        0: none yet) make the retry harmless. Raises `ApiError` (`err_code` 10071: not the expected sequence; 10077: the stream
        is full) or `bus_unavailable`.
        """
        sent = dict(headers or {})
        if msg_id is not None:
            sent[MSG_ID] = msg_id
        if expect_last is not None:
            sent[EXPECTED_LAST_SUBJECT] = str(expect_last)
        loop = asyncio.get_running_loop()
        until = loop.time() + within_s
        while True:
            try:
                answer = _answer((await self.link.request(subject, data, sent, timeout_s=min(5.0, within_s))).data)
                return Ack(answer["stream"], answer["seq"], answer.get("duplicate", False))
            except ApiError:
                raise
            except HubError as exc:
                if exc.code not in ("bus_unavailable", "deadline_passed") or loop.time() >= until:
                    raise
                await asyncio.sleep(0.2)

    async def publish_all(self, messages: Sequence[tuple[str, bytes, Headers]]) -> None:
        """Publish several messages into one stream, all or none (atomic batch, ADR-50; the stream has `allow_atomic`).

        Raises `ApiError`; 10071 where a message's expected sequence did not hold, and then none was stored.
        """
        if len(messages) == 1:
            subject, data, headers = messages[0]
            await self.publish(subject, data, headers)
            return
        batch = hashlib.blake2b(b"".join(s.encode() + d for s, d, _ in messages), digest_size=12).hexdigest()
        batch += f"-{id(messages):x}"
        for number, (subject, data, headers) in enumerate(messages, start=1):
            sent = {**headers, "Nats-Batch-Id": batch, "Nats-Batch-Sequence": str(number)}
            if number == 1:
                # Only the first and the last message are answered: the first says whether batches are possible at all.
                reply = await self.link.request(subject, data, sent)
                if reply.data:
                    _answer(reply.data)
            elif number < len(messages):
                await self.link.publish(subject, data, sent)
            else:
                _answer((await self.link.request(subject, data, {**sent, "Nats-Batch-Commit": "1"})).data)

    # ── key-value (ADR-8) ────────────────────────────────────────────────────────────────────────────────────────────

    def bucket(self, name: str) -> Bucket:
        return Bucket(self, name)

    # ── objects (ADR-20) ─────────────────────────────────────────────────────────────────────────────────────────────

    async def object_info(self, bucket: str, name: str) -> dict[str, Any]:
        """The metadata of an object. Raises `object_not_found`."""
        subject = f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"
        try:
            found = await self.last(f"OBJ_{bucket}", subject)
        except ApiError:
            found = None
        info: dict[str, Any] = msgspec.json.decode(found[0]) if found is not None and found[0] else {}
        if not info or info.get("deleted"):
            raise HubError("object_not_found", f"no object of that name in {bucket}")
        return info

    async def object_get(self, bucket: str, name: str, limit: int, timeout_s: float = 60.0) -> bytes:
        """An object's bytes, checked against its digest.

        Raises `object_not_found`, `doc_too_large` (over `limit` bytes), `digest_mismatch`.
        """
        info = await self.object_info(bucket, name)
        size = int(info.get("size", 0))
        if size > limit:
            raise DocumentRejected("doc_too_large", f"{size} bytes; at most {limit} are read")
        if size == 0:
            return b""
        stream, subject = f"OBJ_{bucket}", f"$O.{bucket}.C.{info['nuid']}"
        config = {
            "filter_subject": subject,
            "ack_policy": "none",
            "deliver_policy": "all",
            "mem_storage": True,
            "inactive_threshold": 30 * NS,
            "num_replicas": 1,
        }
        created = await self.api(f"CONSUMER.CREATE.{stream}", {"stream_name": stream, "config": config})
        parts: list[bytes] = []
        received = 0
        digest = hashlib.sha256()
        puller = Puller(self.link, stream, created["name"], batch=64)
        try:
            async with asyncio.timeout(timeout_s), puller:
                async for message in puller:
                    parts.append(message.data)
                    received += len(message.data)
                    digest.update(message.data)
                    if received >= size:
                        break
        except TimeoutError:
            raise HubError("object_not_found", f"the object's chunks did not arrive within {timeout_s:g} s") from None
        finally:
            with contextlib.suppress(HubError):
                await self.api(f"CONSUMER.DELETE.{stream}.{created['name']}")
        expected = str(info.get("digest", "")).partition("=")[2]
        if received != size or (expected and base64.urlsafe_b64encode(digest.digest()).decode() != expected):
            raise DocumentRejected("digest_mismatch", "the object's bytes are not what its digest says")
        return b"".join(parts)

    async def object_put(self, bucket: str, name: str, data: bytes, chunk: int = 256 * 1024) -> None:
        """Store an object; the bucket is made where it is missing.

        Who may not look at streams (nats.conf: a publisher) relies on the operator to have made it.
        """
        try:
            await self.ensure_stream(object_config(bucket))
        except HubError as exc:
            if exc.code != "forbidden_subject" and not (isinstance(exc, ApiError) and exc.err_code == NOT_ENABLED):
                raise
        nuid = hashlib.blake2b(name.encode() + hashlib.sha256(data).digest(), digest_size=11).hexdigest()
        digest = hashlib.sha256()
        chunks = 0
        for at in range(0, len(data), chunk):
            piece = data[at : at + chunk]
            digest.update(piece)
            chunks += 1
            await self.publish(f"$O.{bucket}.C.{nuid}", piece, msg_id=f"{nuid}.{chunks}")
        info = {
            "name": name,
            "bucket": bucket,
            "nuid": nuid,
            "size": len(data),
            "chunks": chunks,
            "digest": "SHA-256=" + base64.urlsafe_b64encode(digest.digest()).decode(),
            "options": {"max_chunk_size": chunk},
        }
        subject = f"$O.{bucket}.M.{base64.urlsafe_b64encode(name.encode()).decode()}"
        await self.publish(subject, encode_any(info), {"Nats-Rollup": "sub"})

    async def object_delete(self, bucket: str, name: str) -> None:
        """Remove an object's chunks and metadata; one that is not there is no error."""
        with contextlib.suppress(HubError):
            info = await self.object_info(bucket, name)
            await self.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.C.{info['nuid']}"})
            meta = base64.urlsafe_b64encode(name.encode()).decode()
            await self.api(f"STREAM.PURGE.OBJ_{bucket}", {"filter": f"$O.{bucket}.M.{meta}"})


def object_config(bucket: str, replicas: int = 1) -> dict[str, Any]:
    """The stream behind an object store bucket, as the `nats` CLI makes it, with a day's time to live."""
    return {
        "name": f"OBJ_{bucket}",
        "subjects": [f"$O.{bucket}.C.>", f"$O.{bucket}.M.>"],
        "retention": "limits",
        "storage": "file",
        "discard": "new",
        "allow_rollup_hdrs": True,
        "allow_direct": True,
        "num_replicas": replicas,
        "max_age": 24 * 3600 * NS,
    }


class Bucket:
    """A key-value bucket with compare-and-set. No watch: see the module's first lines."""

    def __init__(self, js: JetStream, name: str) -> None:
        self._js = js
        self.name = name
        self.prefix = f"$KV.{name}."

    def config(self, max_age_s: float = 0, history: int = 1, replicas: int = 1) -> dict[str, Any]:
        return {
            "name": f"KV_{self.name}",
            "subjects": [f"{self.prefix}>"],
            "retention": "limits",
            "storage": "file",
            "max_msgs_per_subject": history,
            "max_age": int(max_age_s * NS),
            "discard": "new",
            "deny_delete": True,
            "allow_rollup_hdrs": True,
            "allow_direct": True,
            "num_replicas": replicas,
            "duplicate_window": 120 * NS if not max_age_s or max_age_s > 120 else int(max_age_s * NS),
        }

    async def get(self, key: str) -> tuple[bytes, int] | None:
        """Value and revision, or None."""
        found = await self._js.last(f"KV_{self.name}", self.prefix + key)
        if found is None or found[2].get("KV-Operation") in ("DEL", "PURGE"):
            return None
        return found[0], found[1]

    async def create(self, key: str, value: bytes) -> int | None:
        """The first revision, or None where the key exists."""
        return await self.update(key, value, 0)

    async def update(self, key: str, value: bytes, revision: int) -> int | None:
        """The new revision, or None where somebody else was faster."""
        change = secrets.token_hex(12)
        try:
            return (await self._js.publish(self.prefix + key, value, msg_id=change, expect_last=revision)).seq
        except ApiError as exc:
            if exc.err_code != WRONG_LAST_SEQUENCE:
                raise
        # Or it was ourselves: the ack was lost, the retry came too late (the server looks at the sequence before the id).
        found = await self._js.last(f"KV_{self.name}", self.prefix + key)
        return found[1] if found is not None and found[2].get(MSG_ID) == change else None

    async def put(self, key: str, value: bytes) -> int:
        return (await self._js.publish(self.prefix + key, value)).seq

    async def keys(self) -> list[str]:
        return [s.removeprefix(self.prefix) for s in await self._js.subjects(f"KV_{self.name}", f"{self.prefix}>")]

    async def count(self) -> int:
        """How many keys there are, without reading them."""
        return int((await self._js.stream_state(f"KV_{self.name}")).get("num_subjects", 0))


class Message:
    """One pulled message; it is acknowledged exactly once, by whoever handles it."""

    def __init__(self, link: Link, msg: Msg) -> None:
        self._link = link
        self._reply = msg.reply
        self.subject = msg.subject
        self.data = msg.data
        self.headers: Headers = msg.headers or {}
        # $JS.ACK.<stream>.<consumer>.<deliveries>.<stream seq>.<consumer seq>.<ns>.<pending>; format v2 puts the domain and
        # an account hash behind ACK and a random token last (ADR-15).
        parts = msg.reply.split(".")
        if len(parts) == 9:
            parts = parts[2:]
        elif len(parts) > 9:
            parts = parts[4:]
        else:
            raise Unavailable("bus_unavailable", f"not a JetStream delivery: {msg.reply[:64]}")
        self.stream: str = parts[0]
        self.consumer: str = parts[1]
        self.deliveries = int(parts[2])
        self.sequence = int(parts[3])

    async def ack(self) -> None:
        """Acknowledge and wait until the server has it: after this the message is never delivered again."""
        await self._link.request(self._reply, b"+ACK")

    async def nak(self, delay_s: float) -> None:
        """Hand it back; the server delivers it again after `delay_s` seconds."""
        await self._link.publish(self._reply, b"-NAK " + encode_any({"delay": int(delay_s * NS)}))

    async def in_progress(self) -> None:
        """Restart the ack wait."""
        await self._link.publish(self._reply, b"+WPI")

    async def term(self, reason: str) -> None:
        """Never deliver it again; the reason shows in the server's advisory."""
        await self._link.publish(self._reply, b"+TERM " + reason.encode()[:200])

    @contextlib.asynccontextmanager
    async def kept_alive(self, every_s: float) -> AsyncIterator[None]:
        """While inside, tell the server every `every_s` seconds that work goes on."""

        async def tell() -> None:
            while True:
                await asyncio.sleep(every_s)
                try:
                    await self.in_progress()
                except Unavailable as exc:
                    log.debug("in-progress ack: %s", exc)

        task = asyncio.create_task(tell(), name="in-progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)


class Puller:
    """The messages of a durable consumer, as they come: `async with Puller(...) as p: async for message in p`.

    Survives reconnects and servers that forgot the request: a pull that hears nothing for its time and a little is sent
    again (between accounts the server's word that it expired does not arrive at all). At most `batch` messages are asked for
    at once.
    """

    EXPIRES_S: Final = 5.0
    _GRACE_S: Final = 0.5

    def __init__(self, link: Link, stream: str, consumer: str, batch: int = 1, prefix: str = "$JS.API") -> None:
        self._link = link
        self._subject = f"{prefix}.CONSUMER.MSG.NEXT.{stream}.{consumer}"
        self._batch = batch
        self._arrived: asyncio.Queue[Msg] = asyncio.Queue()
        self._inbox = ""
        self._key = 0

    async def __aenter__(self) -> Puller:
        while True:
            try:
                self._inbox = self._link.inbox()
                self._key = await self._link.subscribe(self._inbox, self._on_message)
                return self
            except Unavailable:  # the connection is just being built anew
                await asyncio.sleep(0.2)

    async def __aexit__(self, *_: object) -> None:
        await self._link.unsubscribe(self._key)

    async def _on_message(self, msg: Msg) -> None:
        self._arrived.put_nowait(msg)

    async def feed(
        self,
        take: Callable[[Message], Coroutine[Any, Any, None]],
        at_once: int,
        start: Callable[[Coroutine[Any, Any, None]], asyncio.Task[None]],
    ) -> None:
        """Hand every message to `take`, at most `at_once` at a time, each in a task that `start` makes; until canceled."""
        gate = asyncio.Semaphore(at_once)
        # Room first, then the message: one that waits here unacknowledged would be handed out again.
        await gate.acquire()
        async for message in self:
            start(take(message)).add_done_callback(lambda _: gate.release())
            await gate.acquire()

    async def __aiter__(self) -> AsyncIterator[Message]:
        while True:
            wanted = self._batch
            try:
                request = {"batch": wanted, "expires": int(self.EXPIRES_S * NS)}
                await self._link.publish(self._subject, encode_any(request), reply=self._inbox)
            except Unavailable:
                await asyncio.sleep(0.2)
                continue
            while wanted:
                try:
                    # Not `wait_for`, which in Python 3.11 can swallow a cancellation that comes together with a message.
                    async with asyncio.timeout(self.EXPIRES_S + self._GRACE_S):
                        msg = await self._arrived.get()
                except TimeoutError:
                    break
                # The server's own words have no reply subject. A header proves nothing: publishers write headers too.
                if msg.reply:
                    wanted -= 1
                    yield Message(self._link, msg)
                    continue
                status = (msg.headers or {}).get("Status", "")
                if status == "503" or status.startswith("4"):
                    # 404/408: nothing there, ask again; 409: the consumer changed or went away; 503: no JetStream right now.
                    if status not in ("404", "408"):
                        log.debug("pull: %s %s", status, (msg.headers or {}).get("Description", ""))
                        await asyncio.sleep(0.2)
                    break


def _answer(data: bytes) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = msgspec.json.decode(data)
    except msgspec.DecodeError as exc:
        raise Unavailable("bus_unavailable", "JetStream gave an answer that is not JSON") from exc
    if error := answer.get("error"):
        raise ApiError(error.get("err_code", 0), error.get("description", ""))
    return answer


def _compare(what: str, ours: dict[str, Any], theirs: dict[str, Any]) -> list[Difference]:
    # The server leaves out fields at their zero value.
    return [
        Difference(what, field, value, theirs.get(field))
        for field, value in ours.items()
        if (theirs.get(field) or None) != (value or None) and not (field == "name" or field == "durable_name")
    ]


def _headers(block: bytes) -> dict[str, str]:
    lines = block.decode("utf-8", "replace").split("\r\n")[1:]
    return {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines) if name}
