"""A real hub in a process of its own, as a user starts it, and a bare nats-py client that knows only the contract."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import nats
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

START_S = 60  # other test runs may share the machine


class Hub:
    """`hubpeer up` on a free port; `kill` and `start` again keep port and data."""

    def __init__(self, data: Path, *options: str, environ: dict[str, str] | None = None) -> None:
        self.data = data
        self.options = options if "--model" in options else ("--model", "none", *options)
        self.environ = {k: v for k, v in os.environ.items() if not k.startswith("HUBPEER_")} | (environ or {})
        self.port = 0
        self.url = ""
        self.process: subprocess.Popen[str] | None = None
        self.log = data.parent / f"{data.name}.log"

    def start(self) -> Hub:
        command = [sys.executable, "-m", "hubpeer", "up", "--port", str(self.port), "--data", str(self.data), *self.options]
        with self.log.open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=self.environ)
        assert self.process.stdout is not None
        line = self.process.stdout.readline().strip()
        if not line.startswith("ready nats://"):
            self.process.kill()
            self.ended()
            raise AssertionError(f"{line!r}\n{self.log.read_text()[-3000:]}")
        self.url = line.removeprefix("ready ")
        self.port = int(self.url.rsplit(":", 1)[1])
        return self

    def kill(self) -> None:
        """SIGKILL, and wait until the NATS server it started is gone too."""
        assert self.process is not None
        self.process.kill()
        self.ended()
        wait_until(lambda: not self.family(), "the killed hub's children are gone")

    def stop(self) -> int:
        if self.process is None or self.process.poll() is not None:
            return self.process.returncode if self.process else 0
        self.process.send_signal(signal.SIGTERM)
        code = self.ended()
        assert not self.family(), "a stopped hub leaves nothing running"
        return code

    def ended(self) -> int:
        assert self.process is not None
        code = self.process.wait(timeout=60)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return code

    def family(self) -> list[str]:
        """Command lines of the processes that belong to this hub: itself, its server, the process that reads documents."""
        zygote = f"hubpeer.documents.zygote {self.process.pid if self.process else None} "
        found = []
        for path in Path("/proc").glob("[0-9]*/cmdline"):
            with contextlib.suppress(OSError):
                line = path.read_bytes().replace(b"\0", b" ").decode(errors="replace")
                zombie = path.with_name("stat").read_text().rpartition(")")[2].split()[0] == "Z"
                if (str(self.data) in line or zygote in line) and not zombie:
                    found.append(line)
        return found


def wait_until(true: Callable[[], Any], what: str, within_s: float = 90) -> Any:
    until = time.monotonic() + within_s
    while time.monotonic() < until:
        if found := true():
            return found
        time.sleep(0.01)
    raise AssertionError(f"not within {within_s} s: {what}")


class Bare:
    """nats-py and JSON, nothing of hubpeer."""

    def __init__(self, nc: Nats) -> None:
        self.nc = nc
        self.js = nc.jetstream()

    async def ask(self, subject: str, body: Any = b"", headers: dict[str, str] | None = None, timeout: float = 60) -> Msg:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        return await self.nc.request(subject, data, timeout=timeout, headers=headers)

    async def reply(self, subject: str, body: Any = b"", headers: dict[str, str] | None = None, timeout: float = 60) -> Any:
        return json.loads((await self.ask(subject, body, headers, timeout)).data)

    async def code(self, subject: str, body: Any = b"", headers: dict[str, str] | None = None) -> str:
        """The error code a request is refused with: in the header and in the body the same."""
        msg = await self.ask(subject, body, headers)
        answer = json.loads(msg.data)
        assert answer.get("status") == "error", answer
        assert msg.headers is not None
        assert msg.headers["Nats-Service-Error"] == answer["error"]["code"]
        assert int(msg.headers["Nats-Service-Error-Code"]) >= 400
        assert len(msg.data) <= 1024
        assert "Traceback" not in answer["error"]["message"]
        return str(answer["error"]["code"])

    async def route(self, asker: str, query: str, **more: Any) -> Any:
        answer = await self.reply(f"hub.route.{asker}", {"query": query, **more})
        assert answer["status"] == "success", answer
        return answer["routing_decision"]

    async def step(self, agent: str, timeout: float = 60) -> Msg:
        """The next step of an agent, taken with bare JetStream."""
        sub = await self.js.pull_subscribe_bind(agent, "PLANS")
        [msg] = await sub.fetch(1, timeout=timeout)
        return msg

    async def answer(self, step: Msg, status: str = "done", **fields: Any) -> None:
        """Report a step's end, then acknowledge it."""
        subject = step.subject.replace("hub.plan.", "hub.result.", 1)
        await self.js.publish(subject, json.dumps({"status": status, **fields}).encode())
        await step.ack()

    async def last(self, stream: str, subject: str, within_s: float = 60) -> Any:
        """The newest message of a subject, as soon as there is one."""
        async with asyncio.timeout(within_s):
            while True:
                try:
                    return json.loads((await self.js.get_last_msg(stream, subject)).data)
                except nats.js.errors.NotFoundError:
                    await asyncio.sleep(0.02)

    async def outcome(self, decision: Any, within_s: float = 60) -> Any:
        return await self.last("OUTCOMES", f"hub.outcome.{decision['requesting_agent']}.{decision['plan_id']}", within_s)


async def _quiet(exc: Exception) -> None:
    """nats-py prints tracebacks of lost connections by default; here they are meant."""


@contextlib.asynccontextmanager
async def bare(url: str) -> AsyncIterator[Bare]:
    nc = await nats.connect(url, error_cb=_quiet, max_reconnect_attempts=-1, reconnect_time_wait=0.1)
    try:
        yield Bare(nc)
    finally:
        await nc.close()
