"""What a store holds, and how one record is written and read. No environment, no transaction.

Every value on disk is a *sealed* record: 16 bytes of blake2b over table, key and payload, then the payload. LMDB 0.9 has no
checksums and serves flipped bits as data (189 of 300 random flips when tried), so nothing is believed unsealed.
"""

from __future__ import annotations

import secrets
import threading
import time
import zlib
from collections.abc import Iterator
from hashlib import blake2b
from typing import Final, Literal

import msgspec
from msgspec import Struct

from hubpeer.errors import BadRequest, StoreError, shown
from hubpeer.wire import Categorization, DocState

#: Characters of text in one record: a page of 100,000 characters unpacks two or three of them.
TEXT_CHUNK: Final = 64 * 1024
#: Bytes of a document's own data in one record. LMDB needs as many pages in a row as one value fills.
BLOB_CHUNK: Final = 1024 * 1024
SCHEMA: Final = 1
_SEAL: Final = 16


class Draft(Struct, frozen=True):
    """A document that has been read and is to be kept; its bytes and its text travel beside it.

    `received_at` is ISO 8601, UTC. `extraction` is "partial" where not everything could be read; `notes` say what.
    """

    filename: str
    media_type: str
    received_at: str
    declared_type: str | None = None
    source_id: str | None = None
    title: str | None = None
    pages: int = 0
    extraction: Literal["ok", "partial"] = "ok"
    notes: list[str] = []
    engine: str = ""
    headings: list[str] = []


class Stored(Struct, frozen=True):
    """One version of a document, as it lies in the store; its bytes and its text lie beside it.

    A document in state `failed` was refused: it has no bytes and no text, only `error` (`code`, `message`).
    """

    document_id: str
    version: int
    client: str
    sha256: str
    size: int
    filename: str
    media_type: str
    declared_type: str | None
    source_id: str | None
    received_at: str
    title: str | None
    pages: int
    text_chars: int
    extraction: Literal["ok", "partial"]
    notes: list[str]
    engine: str
    headings: list[str]
    state: DocState
    categorization: Categorization | None = None
    error: dict[str, str] | None = None

    @property
    def key(self) -> bytes:
        return bytes.fromhex(self.document_id)

    @property
    def digest(self) -> bytes:
        return bytes.fromhex(self.sha256)


class Put(Struct, frozen=True):
    """What became of a document that was to be kept. `duplicate`: it was there already, `stored` says as what."""

    stored: Stored
    duplicate: bool


class Marker(Struct, frozen=True):
    """Written when a store is made: that it is one, whose, and in which layout."""

    client: str
    schema: int
    created_at: str


class Counters(Struct, frozen=True):
    """Kept in the transaction of each change, so that no total is ever counted. `documents` leaves out the `failed` ones."""

    documents: int = 0
    failed: int = 0
    pending: int = 0
    bytes: int = 0
    text_chars: int = 0
    categories: dict[str, int] = {}

    def counting(self, document: Stored, by: int) -> Counters:
        """The counters with `document` in (`by` = 1) or out (-1)."""
        if document.state == "failed":
            return msgspec.structs.replace(self, failed=self.failed + by)
        categories = dict(self.categories)
        if document.categorization is not None:
            name = document.categorization.category
            categories[name] = categories.get(name, 0) + by
            if not categories[name]:
                del categories[name]
        return Counters(
            documents=self.documents + by,
            failed=self.failed,
            pending=self.pending + by * (document.state == "committed"),
            bytes=self.bytes + by * document.size,
            text_chars=self.text_chars + by * document.text_chars,
            categories=categories,
        )


def seal(table: bytes, key: bytes, payload: bytes) -> bytes:
    """`payload` as it is written under `key` of `table`."""
    return _sum(table, key, payload) + payload


def unseal(table: bytes, key: bytes, value: bytes) -> bytes:
    """The payload of a sealed record. Raises `store_corrupt` where a bit of table, key or payload differs."""
    payload = value[_SEAL:]
    if _sum(table, key, payload) != value[:_SEAL]:
        raise StoreError("store_corrupt", f"a record of table {table.decode()} is damaged")
    return payload


def _sum(table: bytes, key: bytes, payload: bytes) -> bytes:
    # A key is at most 511 bytes (LMDB), so two bytes of length keep key and payload apart.
    digest = blake2b(len(key).to_bytes(2, "big") + key, digest_size=_SEAL, person=table)
    digest.update(payload)
    return digest.digest()


def pieces(data: bytes) -> Iterator[bytes]:
    """A document's bytes in records' sizes; nothing for no bytes."""
    for start in range(0, len(data), BLOB_CHUNK):
        yield data[start : start + BLOB_CHUNK]


def packed(text: str) -> list[bytes]:
    """A text as its records. zlib level 1: 2.9 times smaller on prose. Raises `bad_encoding` for a lone surrogate."""
    try:
        return [zlib.compress(text[start : start + TEXT_CHUNK].encode(), 1) for start in range(0, len(text), TEXT_CHUNK)]
    except UnicodeEncodeError as exc:
        raise BadRequest("bad_encoding", f"the text cannot be written as UTF-8: {exc.reason}", field="text") from None


def unpacked(chunk: bytes) -> str:
    return zlib.decompress(chunk).decode()


def source_key(source_id: str) -> bytes:
    """A publisher's own id as a key: of any length, in 32 bytes."""
    return blake2b(source_id.encode("utf-8", "surrogatepass"), digest_size=32).digest()


def category_key(category: str) -> bytes:
    return b"c" + blake2b(category.encode("utf-8", "surrogatepass"), digest_size=16).digest()


def state_key(state: DocState) -> bytes:
    return b"s" + blake2b(state.encode(), digest_size=16).digest()


def document_key(document_id: str) -> bytes | None:
    """A document id as its key; None for what cannot be one (then it is simply not there)."""
    if len(document_id) != 32 or not all(c in "0123456789abcdef" for c in document_id):
        return None
    return bytes.fromhex(document_id)


def not_found(document_id: str) -> BadRequest:
    """Also the answer for a client that has nothing: who asks cannot learn which clients exist."""
    return BadRequest("not_found", f"no document {shown(document_id)!r}", field="document_id")


class Ids:
    """UUIDv7 (RFC 9562): 48 bits of unix milliseconds, 12 of counter, 62 random. Rises within one process even where the
    clock is set back, so that newest first is the order of arrival."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._last = 0

    def new(self) -> bytes:
        with self._lock:
            self._last = max(time.time_ns() // 1_000_000 << 12, self._last + 1)
            milliseconds, counter = divmod(self._last, 1 << 12)
        value = milliseconds << 80 | 0x7 << 76 | counter << 64 | 0b10 << 62 | secrets.randbits(62)
        return value.to_bytes(16, "big")
