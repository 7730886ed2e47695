"""The story of a plan: steps go out, results come in, the outcome goes back.

The state of every plan is one record under `HUB_PLANS/<plan id>`, changed by compare-and-set only. Whatever has to be
published follows from the record (`plan.ready`, `plan.outcome`) and is published in such a way that a second time changes
nothing (a subject's expected sequence is 0), so the order is always: change the record, publish, acknowledge what caused it.
A hub that dies anywhere in between leaves a record from which another one, or itself after a restart, goes on:

1. before the change:  the result is delivered again and the record changes then;
2. before the publish: the record says what is ready; `recover` or the redelivered result publishes it;
3. before the ack:     the result is delivered again and changes nothing.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Awaitable, Callable

import msgspec

from hubpeer import plan, wire
from hubpeer.bus.jetstream import WRONG_LAST_SEQUENCE, ApiError, JetStream, Message, Puller
from hubpeer.bus.link import Link
from hubpeer.bus.service import Endpoint, Reply, Request
from hubpeer.bus.topology import PLANS, PLANS_BUCKET, RESULTS, RESULTS_CONSUMER
from hubpeer.deadletter import DeadLetters
from hubpeer.errors import BadRequest, HubError, Unavailable, shown
from hubpeer.plan import Record
from hubpeer.settings import Settings
from hubpeer.wire import StepMessage

log = logging.getLogger("hubpeer.conduct")

_decoder = msgspec.json.Decoder(Record)


class Conductor:
    """Owns the records of all plans and moves them on."""

    def __init__(
        self, link: Link, js: JetStream, settings: Settings, letters: DeadLetters, clock: Callable[[], float] = time.time
    ) -> None:
        self._link = link
        self._js = js
        self._settings = settings
        self._letters = letters
        self._bucket = js.bucket(PLANS_BUCKET)
        self._clock = clock
        self._due: set[str] = set()  #: ids of plans of which something still has to be published
        self._running: set[str] = set()  #: ids of plans that have not ended, as far as this hub knows
        #: What others answer about a plan of the asker's, by verb.
        self.verbs: dict[str, Callable[[Record, Request], Awaitable[Reply]]] = {}

    # ── beginning ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def begin(self, record: Record, *, dispatch: bool) -> Record:
        """Keep a new plan and, if it is to run, publish its first steps: all of them or none.

        A plan of that id that exists already is returned as it is. Raises `plan_too_large`, or `bus_unavailable`; then no step
        is out, or the sweep publishes them.
        """
        if dispatch:
            record = plan.start(record, self._clock())
        if not self._link.fits(msgspec.json.encode(record), {"x": "y" * 500}):
            raise HubError("plan_too_large", "the plan with its question and context does not fit into one message")
        if await self._bucket.create(record.plan_id, msgspec.json.encode(record)) is None:
            known = await self.find(record.plan_id)
            assert known is not None
            return known
        await self._settle(record)
        return record

    async def find(self, plan_id: str) -> Record | None:
        found = await self._bucket.get(plan_id)
        return _decoder.decode(found[0]) if found is not None else None

    # ── moving on ───────────────────────────────────────────────────────────────────────────────────────────────────

    async def _change(self, plan_id: str, step: Callable[[Record], Record]) -> tuple[Record, Record]:
        """Apply a pure change under compare-and-set; returns the record before and after. Raises `not_found`."""
        while True:
            found = await self._bucket.get(plan_id)
            if found is None:
                raise HubError("not_found", f"there is no plan {shown(plan_id)}")
            before = _decoder.decode(found[0])
            after = step(before)
            if after == before:
                return before, after
            if await self._bucket.update(plan_id, msgspec.json.encode(after), found[1]) is not None:
                return before, after

    async def _settle(self, record: Record, before: Record | None = None) -> None:
        """Publish what the record says is due: the steps that became ready since `before`, or the outcome.

        Where that fails the plan stays in `_due`, and the sweep tries again.
        """
        self._due.add(record.plan_id)
        if record.state == "running":
            self._running.add(record.plan_id)
            old = {s.step_id for s in before.steps if s.state == "ready"} if before is not None else set()
            await self._release(record, [m for m in plan.ready(record) if m.step_id not in old])
        elif record.final:
            if not record.announced:
                await self._announce(record)
            self._running.discard(record.plan_id)
        self._due.discard(record.plan_id)

    async def _release(self, record: Record, steps: list[StepMessage]) -> None:
        messages = []
        for step in steps:
            subject = wire.plan_subject(step.agent, step.plan_id, step.step_id)
            headers = {
                "Nats-Expected-Last-Subject-Sequence": "0",
                wire.CALL_PATH: ",".join(record.call_path),
                wire.REQUEST_ID: record.plan_id,
            }
            messages.append((subject, wire.encode(step), headers))
        if not messages:
            return
        try:
            await self._js.publish_all(messages)
        except ApiError as exc:
            if exc.err_code != WRONG_LAST_SEQUENCE:
                raise
            # Some are out already (we died, or another hub was faster): send the others one by one.
            for subject, data, headers in messages:
                await self._publish_once(subject, data, headers)
        log.info("plan %s: %s", record.plan_id, ", ".join(f"{m.agent}/{m.step_id} is ready" for m in steps))

    async def _publish_once(self, subject: str, data: bytes, headers: wire.Headers | None = None) -> None:
        try:
            await self._js.publish(subject, data, headers, expect_last=0)
        except ApiError as exc:
            if exc.err_code != WRONG_LAST_SEQUENCE:
                raise

    async def _announce(self, record: Record) -> None:
        outcome = plan.outcome(record)
        subject = wire.outcome_subject(outcome.requesting_agent, outcome.plan_id)
        await self._publish_once(subject, wire.encode(outcome))
        await self._change(record.plan_id, lambda r: msgspec.structs.replace(r, announced=True))
        log.info("plan %s: %s", record.plan_id, record.state)

    # ── results ─────────────────────────────────────────────────────────────────────────────────────────────────────

    async def run(self) -> None:
        """Take results until canceled."""
        while True:
            try:
                await self.recover()
                break
            except HubError as exc:  # the bus went away this very moment; it comes back
                log.warning("plans are carried on later: %s", exc)
                await asyncio.sleep(0.5)
        async with asyncio.TaskGroup() as tasks:
            tasks.create_task(self._sweep(), name="plan-sweep")
            async with Puller(self._link, RESULTS, RESULTS_CONSUMER, batch=64) as puller:
                await puller.feed(self._take, 32, tasks.create_task)

    async def _take(self, message: Message) -> None:
        """One result. What cannot be one goes to the DLQ with the reason; what can is applied, settled, acknowledged."""
        try:
            _, _, agent, plan_id, step_id = message.subject.split(".")
            wire.agent_token(agent)
            wire.id_token(plan_id, "bad_plan_id")
            wire.id_token(step_id, "bad_plan_id")
            if len(message.data) > wire.MAX_RESULT + 4096:
                raise BadRequest("field_too_long", f"a result is at most {wire.MAX_RESULT} bytes of JSON", field="result")
            result = wire.decode(wire.StepResult, message.data)
            before, after = await self._change(plan_id, lambda r: plan.report(r, step_id, agent, result, self._clock()))
            await self._settle(after, before if after != before else None)
            await message.ack()
        except Unavailable as exc:
            log.warning("a result waits: %s", exc)  # not acknowledged, so it is delivered again
        except HubError as exc:
            await self._bury(message, exc)
        except Exception:
            log.exception("a result could not be handled; it is delivered again")

    async def _bury(self, message: Message, why: HubError) -> None:
        try:
            await self._letters.bury(message, why)
        except HubError as exc:
            log.warning("a result that is none waits to be buried: %s", exc)

    # ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def recover(self) -> None:
        """Carry on with every plan that has not ended: publish what is due, wherever a hub stopped."""
        for plan_id in await self._bucket.keys():
            record = await self.find(plan_id)
            if record is not None and (record.state == "running" or (record.final and not record.announced)):
                await self._settle(record)

    async def _sweep(self) -> None:
        while True:
            await asyncio.sleep(self._settings.plans.sweep_s)
            for plan_id in self._running | self._due:
                try:
                    before, after = await self._change(
                        plan_id, lambda r: plan.expire(r, self._settings.plans.step_idle_s, self._clock())
                    )
                    await self._settle(after, None if plan_id in self._due else before)
                except HubError as exc:
                    if exc.code == "not_found":  # older than the bucket keeps
                        self._running.discard(plan_id)
                        self._due.discard(plan_id)
                    log.warning("plan %s: %s", plan_id, exc)

    # ── hub.plans.<verb>.<agent> ────────────────────────────────────────────────────────────────────────────────────

    def endpoints(self) -> list[Endpoint]:
        metadata = {"request_schema": "hub.schema.plan_query", "response_schema": "hub.schema.plan_reply"}
        return [Endpoint("plans", "hub.plans.*.*", self.answer, owner=3, metadata=metadata)]

    async def answer(self, request: Request) -> Reply:
        """show, list, cancel, approve, replay: plans of one's own only; another's is as unknown as one that never was."""
        verb, asker = request.tokens[2], wire.agent_token(request.tokens[3])
        if verb == "list":
            return await self._list(asker, wire.decode(wire.PlanList, request.data))
        if verb not in ("show", "cancel", "approve", *self.verbs):
            raise BadRequest("unknown_operation", f"hub.plans has no {shown(verb)!r}: show, list, cancel, approve, replay")
        body = wire.decode(wire.PlanQuery, request.data)
        plan_id = wire.id_token(body.plan_id, "bad_plan_id")
        record = await self.find(plan_id)
        if record is None or record.decision.requesting_agent != asker:
            raise HubError("not_found", f"{asker} has no plan {plan_id}")
        if verb in self.verbs:
            return await self.verbs[verb](record, request)
        if verb == "cancel":
            _, record = await self._change(plan_id, lambda r: plan.cancel(r, body.reason, self._clock()))
            # Steps nobody has taken yet are taken back; one that is being worked on ends in a report that changes nothing.
            await self._js.api(f"STREAM.PURGE.{PLANS}", {"filter": f"hub.plan.*.{plan_id}.*"})
            await self._settle(record)
        elif verb == "approve":
            before, record = await self._change(plan_id, lambda r: plan.start(r, self._clock()))
            await self._settle(record, before if record != before else None)
        return Reply(wire.encode(wire.PlanReply(plan.status(record))))

    async def _list(self, asker: str, query: wire.PlanList) -> Reply:
        found = []
        for plan_id in await self._bucket.keys():
            record = await self.find(plan_id)
            if record is None or record.decision.requesting_agent != asker:
                continue
            if query.state in (None, record.state):
                found.append(record)
        found.sort(key=lambda r: r.created, reverse=True)
        return Reply(wire.encode(wire.PlanListReply([plan.summary(r) for r in found[: query.limit]])))

    async def counts(self) -> dict[str, int]:
        """How many plans this hub knows to be running, and how many are kept in all."""
        return {"running": len(self._running), "kept": await self._bucket.count()}
