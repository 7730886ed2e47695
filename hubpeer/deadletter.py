"""What could not be handled is kept, with the reason, under `hub.dlq.<stream>.<owner>`."""

from __future__ import annotations

import base64
import logging
import time
from collections import Counter

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
        try:
            data, encoding = message.data[:_KEPT].decode("utf-8"), "utf-8"
        except UnicodeDecodeError:
            data, encoding = base64.b64encode(message.data[:_KEPT]).decode(), "base64"
        letter = wire.DeadLetter(
            stream=message.stream,
            subject=message.subject,
            sequence=message.sequence,
            deliveries=message.deliveries,
            error=wire.error_body(error, f"{message.stream}-{message.sequence}"),
            headers={name[:128]: value[:512] for name, value in list(message.headers.items())[:64]},
            size=len(message.data),
            data=data,
            encoding="utf-8" if encoding == "utf-8" else "base64",
            at=wire.iso(time.time()),
        )
        subject = wire.dlq_subject(message.stream, owner)
        await self._js.publish(subject, wire.encode(letter), msg_id=f"{message.stream}-{message.sequence}")
        await message.term(error.code)
        self.counts[error.code] += 1
        log.warning("%s %d is in %s: %s", message.stream, message.sequence, subject, error)
