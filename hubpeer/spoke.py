"""The SDK for agent authors. A whole spoke:

    from hubpeer.spoke import Spoke, Step

    spoke = Spoke("finance", capabilities=["budget_planning"], specialties=["cash_flow"])

    @spoke.step
    async def work(step: Step) -> object:
        return {"answer": f"looked into: {step.task}"}

    spoke.run()

It registers its card, heartbeats, pulls its steps, tells the server while it works, reports, reconnects, and leaves when it
is stopped (Ctrl-C, SIGTERM). A step is handed out again if a spoke dies over it, so a step function may run twice.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import secrets
import signal
from collections.abc import Awaitable, Callable, Coroutine
from typing import Any

import msgspec
from msgspec import Struct

from hubpeer import wire
from hubpeer.bus.jetstream import Message, Puller
from hubpeer.client import Client, Documents
from hubpeer.errors import HubError, Unavailable
from hubpeer.wire import Outcome, StepMessage, StepResult

log = logging.getLogger("hubpeer.spoke")

#: The server gives a step to another process after `plans.ack_wait_s` (30 s) of silence; the hub gives it up after
#: `plans.step_idle_s` (15 min). A working spoke tells both well before.
_TELL_SERVER_S = 8.0
_TELL_HUB_S = 60.0


class StepFailed(Exception):
    """Raise it in a step to report a failure with a text of your own. Any other exception reports its type only."""


class Done(Struct, frozen=True):
    """What a step may return to say more than a result: a `verdict` takes part in the plan's conflict rule."""

    result: Any = None
    verdict: str | None = None


class Step:
    """One step of a plan, as a step function gets it."""

    def __init__(self, spoke: Spoke, message: StepMessage, call_path: str) -> None:
        self._spoke = spoke
        self._call_path = call_path
        self.message = message
        self.plan_id = message.plan_id
        self.step_id = message.step_id
        self.task = message.task
        self.data_needed = message.data_needed
        self.query = message.plan.original_query
        self.requesting_agent = message.plan.requesting_agent
        self.context = message.context or {}
        #: What the steps this one depends on reported, by agent.
        self.results = {agent: step.result for agent, step in message.results.items()}

    async def progress(self, note: str = "") -> None:
        """Tell the hub that work goes on; the step's timeout starts again."""
        await self._spoke.report(self.message, StepResult("progress", note=note or None))

    async def ask(self, query: str, context: dict[str, Any] | None = None, timeout_s: float | None = None) -> Outcome:
        """Ask the hub from within a step. The question carries the agents it went through, so a loop is refused."""
        return await self._spoke.ask(query, context, timeout_s=timeout_s, call_path=self._call_path)


StepFunction = Callable[[Step], Awaitable[Any]]


class Spoke:
    """One agent's process."""

    def __init__(
        self,
        agent: str,
        capabilities: list[str],
        specialties: list[str] | None = None,
        description: str = "",
        *,
        url: str | None = None,
        concurrency: int = 4,
        heartbeat_s: float | None = None,
        **access: Any,
    ) -> None:
        """`url`: the NATS server (default: `HUBPEER_NATS__URL`, else nats://127.0.0.1:4222); `access`: `user`, `password`,
        `token`, `creds`, `tls_ca`, `tls_cert`, `tls_key`; `concurrency`: steps worked on at once."""
        server = url or os.environ.get("HUBPEER_NATS__URL") or "nats://127.0.0.1:4222"
        self.agent = wire.agent_token(agent)
        self.client = Client(server, agent=agent, **access)
        self._card = wire.Register(
            capabilities, specialties or [], description, heartbeat_s, instance=secrets.token_hex(8), agent=agent
        )
        msgspec.convert(msgspec.to_builtins(self._card), wire.Register)  # a card that is too long fails here, not on the bus
        self._concurrency = concurrency
        self._function: StepFunction | None = None
        self._tasks: list[asyncio.Task[None]] = []
        self._working: set[asyncio.Task[None]] = set()
        self._registered: wire.RegisterReply | None = None
        self.steps_done = 0
        self.steps_failed = 0

    def step(self, function: StepFunction) -> StepFunction:
        """Decorator: `function` works on this agent's steps. What it returns is the step's result (JSON, at most 64 KiB)."""
        self._function = function
        return function

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def run(self) -> None:
        """Work until stopped by Ctrl-C or SIGTERM."""
        if not logging.getLogger().handlers:
            logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s")
        asyncio.run(self._run())

    async def _run(self) -> None:
        stop = asyncio.Event()
        for number in (signal.SIGINT, signal.SIGTERM):
            asyncio.get_running_loop().add_signal_handler(number, stop.set)
        async with self:
            log.info("%s is ready", self.agent)
            await stop.wait()

    async def __aenter__(self) -> Spoke:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def start(self) -> None:
        """Connect, register (waiting for a hub where there is none yet) and begin to take steps."""
        await self.client.open()
        self._registered = await self._register()
        self._tasks = [asyncio.create_task(self._heartbeat(), name="heartbeat")]
        if self._function is not None:
            self._tasks.append(asyncio.create_task(self._pull(), name="steps"))

    async def stop(self, grace_s: float = 10.0) -> None:
        """Take no new step, finish those begun within `grace_s` seconds, say goodbye, disconnect."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []
        if self._working:
            _, late = await asyncio.wait(self._working, timeout=grace_s)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        try:
            if self._registered is not None and self.client.link.connected:
                await self.client.presence("leave", self._card.instance)
        except HubError as exc:
            log.info("no hub to say goodbye to: %s", exc)
        await self.client.close()

    async def _register(self) -> wire.RegisterReply:
        while True:
            try:
                return await self.client.register(self._card)
            except HubError as exc:
                if exc.code not in ("bus_unavailable", "deadline_passed", "draining", "queue_full"):
                    raise
                log.info("waiting for a hub: %s", exc)
                await asyncio.sleep(0.5)

    async def _heartbeat(self) -> None:
        assert self._registered is not None
        while True:
            await asyncio.sleep(self._registered.heartbeat_s)
            try:
                await self.client.presence("heartbeat", self._card.instance)
            except HubError as exc:
                if exc.code == "unknown_agent":  # a hub that has forgotten us
                    self._registered = await self._register()
                else:
                    log.info("heartbeat: %s", exc)

    # ── steps ───────────────────────────────────────────────────────────────────────────────────────────────────────

    async def _pull(self) -> None:
        assert self._registered is not None

        def start(work: Coroutine[Any, Any, None]) -> asyncio.Task[None]:
            task = asyncio.create_task(work, name="step")
            self._working.add(task)
            task.add_done_callback(self._working.discard)
            return task

        async with Puller(self.client.link, self._registered.stream, self._registered.consumer) as puller:
            await puller.feed(self._take, self._concurrency, start)

    async def _take(self, message: Message) -> None:
        """One step: work, report, then acknowledge. Killed before the ack, the step is handed out again."""
        try:
            step = wire.decode_reply(StepMessage, message.data)
            if step.agent != self.agent or message.subject != wire.plan_subject(self.agent, step.plan_id, step.step_id):
                raise HubError("bad_subject", "the step is not ours")
        except HubError as exc:
            log.error("a message on %s is no step: %s", message.subject, exc)
            await message.term(exc.code)
            return
        try:
            async with message.kept_alive(_TELL_SERVER_S), self._told(step):
                result = await self._work(step, message.headers.get(wire.CALL_PATH, ""))
            await self.report(step, result)
            await message.ack()
        except HubError as exc:
            log.error("step %s of plan %s is not reported, it comes again: %s", step.step_id, step.plan_id, exc)

    async def _work(self, step: StepMessage, call_path: str) -> StepResult:
        assert self._function is not None
        try:
            value = await self._function(Step(self, step, call_path))
            done = value if isinstance(value, Done) else Done(value)
            if len(wire.encode_any(done.result)) > wire.MAX_RESULT:
                raise StepFailed(f"the result is larger than {wire.MAX_RESULT} bytes")
        except StepFailed as exc:
            self.steps_failed += 1
            return StepResult("failed", error=str(exc)[:2000])
        except Exception as exc:
            log.exception("step %s of plan %s failed", step.step_id, step.plan_id)
            self.steps_failed += 1
            return StepResult("failed", error=f"the agent failed: {type(exc).__name__}")
        self.steps_done += 1
        return StepResult("done", result=done.result, verdict=done.verdict)

    @contextlib.asynccontextmanager
    async def _told(self, step: StepMessage) -> Any:
        """While inside, the hub hears that the step is being worked on: at once, and every minute."""

        async def tell() -> None:
            while True:
                try:
                    await self.report(step, StepResult("progress"))
                except HubError as exc:
                    log.info("progress of step %s: %s", step.step_id, exc)
                await asyncio.sleep(_TELL_HUB_S)

        task = asyncio.create_task(tell(), name="progress")
        try:
            yield
        finally:
            task.cancel()
            await asyncio.gather(task, return_exceptions=True)

    async def report(self, step: StepMessage, result: StepResult) -> None:
        """Publish a result into RESULTS and wait until it is there."""
        subject = wire.result_subject(self.agent, step.plan_id, step.step_id)
        msg_id = None if result.status == "progress" else f"{self.agent}.{step.plan_id}.{step.step_id}.{secrets.token_hex(4)}"
        await self.client.js.publish(subject, wire.encode(result), msg_id=msg_id)

    # ── asking ──────────────────────────────────────────────────────────────────────────────────────────────────────

    async def ask(
        self, query: str, context: dict[str, Any] | None = None, *, timeout_s: float | None = None, call_path: str = ""
    ) -> Outcome:
        """Route a question, wait until its plan has ended, and return the outcome with every step's result."""
        loop = asyncio.get_running_loop()
        until = loop.time() + timeout_s if timeout_s is not None else None
        request_id = secrets.token_hex(12)
        while True:
            try:
                decision = await self.client.route(
                    query, context, call_path=call_path, request_id=request_id, timeout_s=timeout_s
                )
                break
            except Unavailable as exc:  # a hub that is just starting again; the request id makes asking again harmless
                if until is not None and loop.time() > until:
                    raise
                log.info("waiting for a hub: %s", exc)
                await asyncio.sleep(0.5)
        left = until - loop.time() if until is not None else None
        return await self.client.outcome(decision.plan_id, left)

    def docs(self, client: str) -> Documents:
        """One client's documents."""
        return self.client.docs(client)
