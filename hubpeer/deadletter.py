"""What could not be handled is kept, with the reason, under `hub.dlq.<stream>.<owner>`."""

from __future__ import annotations

import base64
import logging
import time
from collections import Counter
from typing import Literal

from hubpeer import wire
from hubpeer.bus.jetstream import JetStream, Message
from hubpeer.errors import HubError

log = logging.getLogger("hubpeer.dlq")

#: Of a message larger than this only the beginning is kept in the letter (bytes).
_KEPT = 256 * 1024


class DeadLetters:
    def __init__(self, js: JetStream) -> None:
        self._js = js
        self.counts: Counter[str] = Counter()

    async def bury(self, message: Message, error: HubError) -> None:
        """Keep the message and the reason in the DLQ, then tell the server never to deliver it again; in that order."""
        owner = message.subject.split(".")[2 if message.stream == "RESULTS" else -1]
        data, encoding = _as_text(message.data[:_KEPT])
        letter = wire.DeadLetter(
            stream=message.stream,
            subject=message.subject,
            sequence=message.sequence,
            deliveries=message.deliveries,
            error=wire.error_body(error, f"{message.stream}-{message.sequence}"),
            headers={name[:128]: value[:512] for name, value in list(message.headers.items())[:64]},
            size=len(message.data),
            data=data,
            encoding=encoding,
            at=wire.iso(time.time()),
        )
        subject = wire.dlq_subject(message.stream, owner)
        await self._js.publish(subject, wire.encode(letter), msg_id=f"{message.stream}-{message.sequence}")
        await message.term(error.code)
        self.counts[error.code] += 1
        log.warning("%s %d is in %s: %s", message.stream, message.sequence, subject, error)


def _as_text(data: bytes) -> tuple[str, Literal["utf-8", "base64"]]:
    """`data` as it may stand in a letter that fits into one message: control characters take six bytes each in JSON."""
    try:
        text = data.decode("utf-8")
        if len(wire.encode_any(text)) <= 2 * _KEPT:
            return text, "utf-8"
    except UnicodeDecodeError:
        pass
    return base64.b64encode(data).decode(), "base64"
