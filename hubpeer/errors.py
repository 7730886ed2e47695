"""Every error hubpeer gives, with a stable code.

    HubError                one coded error: what a caller did wrong, or what the hub could not do
     ├─ BadRequest          the request itself is wrong (400, 403, 413, 422)
     ├─ DocumentRejected    a document cannot be read; the reason is kept (413, 422)
     ├─ Busy                no room now; `retry_after_ms` says when to come back (429)
     ├─ StoreError          a client's store could not do it; other clients go on (413, 429, 500)
     └─ Unavailable         the bus, the model or a child process is not there (503)
    SettingsError           a setting is wrong; raised at start only

Codes are contract (NATS ADR-7: "error text is not API"); the text may be reworded at any time.
`STATUS` lists every code with the number that goes into `Nats-Service-Error-Code` (NATS ADR-32).
"""

from __future__ import annotations

from typing import Final

STATUS: Final[dict[str, int]] = {
    # the message does not read as what it should be
    "bad_json": 400,
    "bad_encoding": 400,
    "bad_character": 422,
    "bad_type": 422,
    "bad_number": 422,
    "bad_value": 422,
    "out_of_range": 422,
    "missing_field": 422,
    "unknown_field": 422,
    "duplicate_key": 400,
    "too_deep": 400,
    "too_many_items": 422,
    "too_many_fields": 422,
    "field_too_long": 422,
    "empty_field": 422,
    "empty_query": 422,
    "bad_header": 400,
    "bad_subject": 400,
    "bad_agent_id": 400,
    "bad_client_id": 400,
    "reserved_client_id": 400,
    "bad_doc_id": 400,
    "bad_plan_id": 400,
    "bad_request_id": 400,
    "bad_deadline": 400,
    "unknown_operation": 400,
    "payload_too_large": 413,
    "reply_too_large": 413,
    "plan_too_large": 413,
    # who asks, and for what
    "identity_mismatch": 403,
    "forbidden_subject": 403,
    "client_not_named": 403,
    "call_loop": 409,
    "not_found": 404,
    "unknown_client": 404,
    "unknown_agent": 404,
    "no_match": 404,
    "unknown_schema": 404,
    "conflict": 409,
    "plan_finished": 409,
    "deadline_passed": 408,
    # documents
    "empty_document": 422,
    "digest_mismatch": 422,
    "unsupported_type": 422,
    "bad_pdf": 422,
    "pdf_encrypted": 422,
    "bad_docx": 422,
    "docx_encrypted": 422,
    "bad_document": 422,
    "no_text": 422,
    "doc_too_large": 413,
    "too_many_pages": 413,
    "extraction_timeout": 422,
    "extraction_memory": 422,
    "extraction_crashed": 422,
    "object_not_found": 404,
    "unreadable_file": 400,  # the command line's own: a file of yours it cannot open
    # no room, or not now
    "queue_full": 429,
    "store_full": 429,
    "quota_exceeded": 413,
    "store_locked": 500,
    "store_corrupt": 500,
    "store_io_error": 500,
    "store_unsafe_path": 500,
    "draining": 503,
    "bus_unavailable": 503,
    "model_unavailable": 503,
    "extractor_unavailable": 503,
    "internal": 500,
}


class HubError(Exception):
    """One coded error.

    `code` is a key of `STATUS`; `field` names the offending field as the caller wrote it;
    `retry_after_ms` is set where coming back later helps.
    """

    #: Set where the reason of a refusal was kept under a document id.
    document_id: str | None = None

    def __init__(self, code: str, message: str, *, field: str | None = None, retry_after_ms: int | None = None) -> None:
        self.code = code
        self.status = STATUS[code]
        self.message = message
        self.field = field
        self.retry_after_ms = retry_after_ms
        super().__init__(f"{code}: {message}")


class BadRequest(HubError):
    """The caller must change the request; sending it again as it is cannot help."""


class DocumentRejected(HubError):
    """These bytes cannot become a document. Final: the same bytes are never tried again."""


class Busy(HubError):
    """No room now."""

    def __init__(self, code: str, message: str, *, retry_after_ms: int) -> None:
        super().__init__(code, message, retry_after_ms=retry_after_ms)


class StoreError(HubError):
    """One client's store refused or failed; every other client's goes on."""


class Unavailable(HubError):
    """A part the hub leans on is not there at the moment; the same request may succeed later."""


class SettingsError(Exception):
    """A setting is wrong. The text says which, where it was read, and what is allowed."""


def shown(value: object, limit: int = 64) -> str:
    """`value` as it may be echoed to a caller or a log: one line, escaped, at most `limit` characters."""
    text = ascii(value)[1:-1] if isinstance(value, str) else ascii(value)
    return text if len(text) <= limit else text[: limit - 3] + "..."
