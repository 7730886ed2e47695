"""docs/howto/nats-cli.md, command by command, against a running hub: each is taken apart and done with bare nats-py."""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import re
import shlex
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from nats.aio.client import Client as Nats
from nats.aio.msg import Msg

from tests.bus.helpers import raw

PAGE = Path(__file__).parents[2] / "docs/howto/nats-cli.md"
BRIEF = b"Campaign brief: spring launch. Target audience: families."


def commands() -> list[str]:
    blocks = re.findall(r"^```console\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [line.removeprefix("$ ") for block in blocks for line in block.splitlines() if line.startswith("$ ")]


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    folder = tmp_path_factory.mktemp("howto")
    environ = {name: value for name, value in os.environ.items() if not name.startswith("HUBPEER_")}
    command = [sys.executable, "-m", "hubpeer", "up", "--port", "0", "--data", str(folder / "data")]
    with (folder / "log").open("w") as log:
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
    assert process.stdout is not None
    try:
        line = process.stdout.readline()
        assert line.startswith("ready "), (folder / "log").read_text()
        yield line.split()[1]
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        process.stdout.close()
    assert process.returncode == 0


class Replay:
    """Does what a command means; remembers what later ones refer to."""

    def __init__(self, nc: Nats) -> None:
        self.nc = nc
        self.js = nc.jetstream()
        self.known: dict[str, str] = {}
        self.receipts: list[Any] = []
        self.done: set[str] = set()

    async def run(self, line: str) -> None:
        line, _, code = line.partition("    # ")
        for name in sorted(self.known, key=len, reverse=True):
            line = re.sub(rf"\b{name}\b", self.known[name], line)
        stdin = b""
        if " < " in line:
            line, _, file = line.partition(" < ")
            assert file == "brief.md"
            stdin = BRIEF
        program, *words = shlex.split(line)
        assert program == "nats"
        verb = words.pop(0)
        if verb in ("micro", "stream", "consumer", "kv", "object", "server"):
            verb += f"_{words.pop(0)}"
        self.done.add(verb)
        assert not code or verb == "req"
        await getattr(self, verb)(words, stdin, code)

    def parse(self, words: list[str], *arguments: str) -> argparse.Namespace:
        parser = argparse.ArgumentParser(exit_on_error=False)
        for name in arguments:
            parser.add_argument(name)
        parser.add_argument("-H", action="append", default=[], dest="headers")
        for flag in ("-J", "--force-stdin", "--no-templates", "--raw", "--force"):
            parser.add_argument(flag, action="store_true")
        for flag in ("--timeout", "--last-for", "--subject", "--match-payload", "--ttl"):
            parser.add_argument(flag)
        found = parser.parse_intermixed_args(words)
        found.headers = dict(header.split(":", 1) for header in found.headers) or None
        found.seconds = float((found.timeout or "5s").removesuffix("s"))
        return found

    # ── one method for each command ──

    async def req(self, words: list[str], stdin: bytes, code: str) -> None:
        given = self.parse(words, "subject", "body")
        assert "{{" not in given.body
        msg = await self.nc.request(given.subject, given.body.encode(), timeout=max(given.seconds, 15), headers=given.headers)
        answer = json.loads(msg.data)
        if code:
            assert answer["error"]["code"] == code == msg.headers["Nats-Service-Error"], answer
            return
        assert answer.get("status", "success") in ("success", "ok"), (given.subject, answer)
        if given.subject == "hub.route.finance" and "PLAN" not in self.known:
            decision = answer["routing_decision"]
            assert [step["agent"] for step in decision["agents"]] == ["marketing"]
            self.known["PLAN"] = decision["plan_id"]
        elif given.subject == "hub.route.ceo":
            assert answer["routing_decision"]["state"] == "proposed"
            self.known["PROPOSED"] = answer["routing_decision"]["plan_id"]
        elif given.subject.startswith("hub.plans.list"):
            assert [p["plan_id"] for p in answer["plans"]] == [self.known["PROPOSED"]]
        elif given.subject.startswith("hub.docs.ingest"):
            self.known["DOCUMENT"] = answer["document_id"]
            assert answer["state"] in ("committed", "categorized")
            if given.headers and "Hub-Wait" in given.headers:
                assert answer["categorization"]["category"]
        elif given.subject == "hub.docs.list.acme":
            assert answer["documents"], given.body

    async def pub(self, words: list[str], stdin: bytes, code: str) -> None:
        given = self.parse(words, "subject", "body") if not stdin else self.parse(words, "subject")
        assert given.J, "without -J nobody knows whether it arrived"
        assert given.no_templates is given.force_stdin is bool(stdin)
        await self.js.publish(given.subject, stdin or given.body.encode(), headers=given.headers)
        if given.subject.startswith("hub.docs.stream"):
            wanted = given.headers["Hub-Filename"]
            async with asyncio.timeout(30):
                while not any(r.get("filename") == wanted and r["status"] == "success" for r in self.receipts):
                    await asyncio.sleep(0.02)
            self.receipts.clear()

    async def sub(self, words: list[str], stdin: bytes, code: str) -> None:
        async def hear(msg: Msg) -> None:
            self.receipts.append(json.loads(msg.data))

        await self.nc.subscribe(self.parse(words, "subject").subject, cb=hear)
        await self.nc.flush()

    async def consumer_next(self, words: list[str], stdin: bytes, code: str) -> None:
        given = self.parse(words, "stream", "consumer")
        sub = await self.js.pull_subscribe_bind(given.consumer, given.stream)
        while "STEP" not in self.known:
            [msg] = await sub.fetch(1, timeout=20)
            await msg.ack()
            _, _, agent, plan, step = msg.subject.split(".")
            assert agent == given.consumer
            if plan == self.known["PLAN"]:
                self.known["STEP"] = step

    async def stream_get(self, words: list[str], stdin: bytes, code: str) -> None:
        given = self.parse(words, "stream")
        async with asyncio.timeout(30):
            while True:
                body: dict[str, Any] = {"last_by_subj": given.last_for}
                found = json.loads(
                    (
                        await self.nc.request(f"$JS.API.STREAM.MSG.GET.{given.stream}", json.dumps(body).encode(), timeout=10)
                    ).data
                )
                if "error" not in found:
                    assert found["message"]["subject"] == given.last_for
                    return
                await asyncio.sleep(0.02)

    async def api(self, subject: str) -> Any:
        answer = json.loads((await self.nc.request(f"$JS.API.{subject}", b"", timeout=10)).data)
        assert "error" not in answer, (subject, answer)
        return answer

    async def stream_ls(self, words: list[str], stdin: bytes, code: str) -> None:
        assert {"PLANS", "RESULTS", "OUTCOMES", "DOCS", "RECEIPTS", "DLQ"} <= set((await self.api("STREAM.NAMES"))["streams"])

    async def stream_info(self, words: list[str], stdin: bytes, code: str) -> None:
        await self.api(f"STREAM.INFO.{words[0]}")

    stream_subjects = stream_info

    async def consumer_ls(self, words: list[str], stdin: bytes, code: str) -> None:
        assert "marketing" in (await self.api(f"CONSUMER.NAMES.{words[0]}"))["consumers"]

    async def consumer_info(self, words: list[str], stdin: bytes, code: str) -> None:
        await self.api(f"CONSUMER.INFO.{words[0]}.{words[1]}")

    async def kv_get(self, words: list[str], stdin: bytes, code: str) -> None:
        entry = await (await self.js.key_value(words[0])).get(words[1])
        assert entry.value is not None

    async def object_add(self, words: list[str], stdin: bytes, code: str) -> None:
        given = self.parse(words, "bucket")
        await self.js.create_object_store(given.bucket, ttl=float(given.ttl.removesuffix("h")) * 3600)

    async def object_put(self, words: list[str], stdin: bytes, code: str) -> None:
        given = self.parse(words, "bucket", "file")
        await (await self.js.object_store(given.bucket)).put(given.file, BRIEF * 20_000)

    async def micro(self, verb: str, words: list[str]) -> None:
        subject = ".".join([f"$SRV.{verb}", *words])
        answer = json.loads((await self.nc.request(subject, b"", timeout=10)).data)
        assert answer["name"] == "hubpeer"
        assert answer["type"] == f"io.nats.micro.v1.{verb.lower()}_response"

    async def micro_ls(self, words: list[str], stdin: bytes, code: str) -> None:
        await self.micro("PING", words)

    micro_ping = micro_ls

    async def micro_info(self, words: list[str], stdin: bytes, code: str) -> None:
        await self.micro("INFO", words)

    async def micro_stats(self, words: list[str], stdin: bytes, code: str) -> None:
        await self.micro("STATS", words)

    async def server_check(self, words: list[str], stdin: bytes, code: str) -> None:
        assert words.pop(0) == "request"
        given = self.parse(words)
        answer = await self.nc.request(given.subject, b"", timeout=10)
        assert given.match_payload.encode() in answer.data


async def test_every_command_of_the_page_does_what_it_says(hub: str) -> None:
    async with raw(hub) as nc:
        replay = Replay(nc)
        for line in commands():
            try:
                await replay.run(line)
            except Exception as exc:
                raise AssertionError(f"{line}\n{exc!r}") from exc
        assert {"PLAN", "STEP", "PROPOSED", "DOCUMENT"} == set(replay.known)
        assert len(replay.done) >= 15


def test_the_page_uses_no_header_and_no_subject_that_is_not_in_the_contract() -> None:
    from hubpeer import wire

    text = PAGE.read_text("utf-8")
    headers = {value for name, value in vars(wire).items() if name.isupper() and isinstance(value, str)}
    assert set(re.findall(r"\bHub-[A-Z][A-Za-z0-9-]+", text)) <= headers
    assert len(commands()) >= 45
