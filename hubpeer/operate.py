"""What operators ask: `hub.health`, `hub.status`, `hub.schema.<name>`."""

from __future__ import annotations

import resource
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hubpeer import __version__, contract, wire
from hubpeer.bus.jetstream import Difference, JetStream
from hubpeer.bus.link import Link
from hubpeer.bus.service import Endpoint, Reply, Request, Service
from hubpeer.bus.topology import STREAMS
from hubpeer.conduct import Conductor
from hubpeer.deadletter import DeadLetters
from hubpeer.documents import Extractor
from hubpeer.errors import HubError
from hubpeer.ingest import Ingest
from hubpeer.model import Model
from hubpeer.roster import Roster
from hubpeer.route import Router
from hubpeer.store import Stores

if TYPE_CHECKING:  # numpy is loaded only where the encoder is used
    from hubpeer.encoder import BuiltIn

_MiB = 1024 * 1024


def memory_mb() -> tuple[float, float]:
    """Resident memory of this process now and at its peak, in MiB (proc(5), getrusage(2))."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    try:
        pages = int(Path("/proc/self/statm").read_text().split()[1])
    except OSError:  # no /proc on this system: the peak is the best there is
        return round(peak, 1), round(peak, 1)
    return round(pages * resource.getpagesize() / _MiB, 1), round(peak, 1)


class Operations:
    """Everything an operator can see, from one place."""

    def __init__(
        self,
        core: Link,
        front: Link,
        js: JetStream,
        service: Service,
        roster: Roster,
        router: Router,
        conductor: Conductor,
        ingest: Ingest,
        stores: Stores,
        extractor: Extractor,
        model: Model | None,
        encoder: BuiltIn | None,
        letters: DeadLetters,
        differences: list[Difference],
    ) -> None:
        self._core = core
        self._front = front
        self._js = js
        self._service = service
        self._roster = roster
        self._router = router
        self._conductor = conductor
        self._ingest = ingest
        self._stores = stores
        self._extractor = extractor
        self._model = model
        self._encoder = encoder
        self._letters = letters
        self._differences = differences
        self._started = time.monotonic()

    def endpoints(self) -> list[Endpoint]:
        return [
            Endpoint("health", wire.HUB_HEALTH, self._answer_health, metadata={"response_schema": "hub.schema.health"}),
            Endpoint("status", wire.HUB_STATUS, self._answer_status, metadata={"response_schema": "hub.schema.status"}),
            Endpoint("schema", wire.HUB_SCHEMA, self._answer_schema),
        ]

    async def _answer_schema(self, request: Request) -> Reply:
        return Reply(wire.encode_any(contract.schema(request.tokens[2])))

    async def _answer_health(self, _: Request) -> Reply:
        return Reply(wire.encode(await self.health()))

    async def _answer_status(self, _: Request) -> Reply:
        return Reply(wire.encode(await self.status()))

    async def health(self) -> wire.Health:
        """`ok`, or `degraded` with what is wrong; the hub answers in both cases."""
        model = self._model_status()
        failing = self._stores.status().get("failing") or {}
        checks = {
            "core_connection": "ok" if self._core.connected else "down",
            "front_connection": "ok" if self._front.connected else "down",
            "jetstream": await _state(self._jetstream_answers),
            "stores": f"{len(failing)} failing" if failing else "ok",
            "model": "none" if model["model_name"] == "none" else "ok" if model["loaded"] else "not loaded",
            "configuration": f"{len(self._differences)} differences" if self._differences else "ok",
        }
        good = all(value in ("ok", "none") for value in checks.values())
        return wire.Health("ok" if good else "degraded", checks)

    def _model_status(self) -> dict[str, Any]:
        """Of what answers first; the encoder behind a language model shows as its `encoder`."""
        encoder = self._encoder.status() if self._encoder is not None else None
        if self._model is not None:
            return {**self._model.status(), "encoder": encoder}
        return encoder or {"model_name": "none", "loaded": False}

    async def _jetstream_answers(self) -> None:
        await self._js.api("INFO", timeout_s=2)

    async def status(self) -> wire.StatusReply:
        resident, peak = memory_mb()
        model = self._model_status()
        endpoints = self._service.snapshot()
        health = await self.health()
        return wire.StatusReply(
            status=health.status,
            name=self._service.NAME,
            version=__version__,
            instance=self._service.instance,
            uptime_s=round(time.monotonic() - self._started, 1),
            memory_usage_mb=resident,
            memory_peak_mb=peak,
            model_name=str(model["model_name"]),
            model_loaded=bool(model["loaded"]),
            queue_size=self._service.in_flight,
            model=model,
            queue={"requests": self._service.in_flight, "uncategorized": self._ingest.uncategorized},
            agents=self._roster.states(),
            plans=await self._conductor.counts(),
            streams=[await self._stream(name) for name in STREAMS],
            stores=self._stores.status(),
            documents={"counts": dict(self._ingest.counts), "extractor": self._extractor.status()},
            bus={
                "server": self._core.server_version if self._core.connected else None,
                "rebuilt": self._core.rebuilt + self._front.rebuilt,
                "refused": {**self._core.refused, **self._front.refused},
                "bad_replies": self._service.bad_replies,
                "expired_requests": self._service.expired,
                "dead_letters": dict(self._letters.counts),
                "differences": [str(difference) for difference in self._differences],
                "checks": health.checks,
            },
            routing={"counts": dict(self._router.counts), "endpoints": endpoints},
        )

    async def _stream(self, name: str) -> dict[str, Any]:
        try:
            state = await self._js.stream_state(name)
        except HubError as exc:
            return {"name": name, "error": str(exc)}
        return {"name": name, "messages": state["messages"], "bytes": state["bytes"], "last_seq": state["last_seq"]}


async def _state(check: Callable[[], Awaitable[None]]) -> str:
    try:
        await check()
    except HubError as exc:
        return str(exc)
    return "ok"
