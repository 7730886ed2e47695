"""`hubpeer demo`: everything once, on this machine, and nothing left behind."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import sys
import tempfile
from collections.abc import AsyncIterator
from typing import Any, Final

import msgspec
from rich.markup import escape

from hubpeer.cli import samples, show
from hubpeer.client import Client
from hubpeer.errors import HubError
from hubpeer.peer import Peer
from hubpeer.settings import Settings

SPOKES: Final = ("finance", "marketing", "sales", "ceo")
#: The specification's three scenarios, and one that names several agents' words, so that a chain can be seen running.
QUESTIONS: Final = (
    ("finance", "I need ROI analysis for our Q4 holiday marketing campaign to validate budget allocation"),
    (
        "ceo",
        "Should we acquire Company X? I need comprehensive analysis of financial impact, market implications, and integration "
        "complexity",
    ),
    ("marketing", "How should I reallocate my Q1 marketing budget across digital channels for maximum ROI?"),
    ("ceo", "Compare the cost of the spring campaign with the pipeline it brought"),
)
CLIENT: Final = "acme"


async def run(settings: Settings, keep: str | None, *, as_json: bool) -> None:
    """Start a server, a hub and four spokes, show questions and documents, stop it all."""
    logging.basicConfig(level="ERROR", format="%(levelname)s %(name)s: %(message)s", stream=sys.stderr)
    say = _silent if as_json else show.console.print
    told: dict[str, Any] = {"routes": [], "documents": []}
    with tempfile.TemporaryDirectory(prefix="hubpeer-demo-") as scratch:
        own = msgspec.structs.replace(settings, data=keep or scratch, server=msgspec.structs.replace(settings.server, port=0))
        async with Peer.open(own) as peer:
            stop = asyncio.Event()
            serving = asyncio.create_task(peer.serve(stop), name="hub")
            try:
                say(f"hub and NATS server: [bold]{peer.url}[/], model: {own.model.name}")
                async with _spokes(peer.url), Client(peer.url, agent="finance") as hub:
                    await _all_live(hub)
                    say(f"spokes: {', '.join(SPOKES)}\n")
                    for asker, query in QUESTIONS:
                        told["routes"].append(await _question(peer.url, asker, query, say, as_json))
                    told["documents"] = await _documents(hub, say, as_json)
                    if not as_json:
                        show.status(await hub.status())
            finally:
                stop.set()
                await serving
    if as_json:
        show.emit(told)
    say('\nNothing is left running. Next: `hubpeer up`, then examples/spoke.py and `hubpeer route --as ceo "..."`.')


def _silent(*_: object) -> None:
    """Say nothing: with --json only the one document is printed."""


async def _question(url: str, asker: str, query: str, say: Any, quiet: bool) -> dict[str, Any]:
    async with Client(url, agent=asker) as hub:
        decision = await hub.route(query)
        outcome = await hub.outcome(decision.plan_id, timeout_s=120)
    if not quiet:
        say(f"[bold]{asker}[/] asks: {escape(query)}")
        show.plan(decision, outcome.steps)
        show.outcome(outcome)
        say("")
    if outcome.status != "done":
        raise HubError("internal", f"the demo's plan ended as {outcome.status}")
    return {"asker": asker, "decision": decision, "outcome": outcome}


async def _documents(hub: Client, say: Any, quiet: bool) -> list[Any]:
    mine = hub.docs(CLIENT)
    say(f"[bold]documents[/] of client {CLIENT}: given to hub.docs.ingest.{CLIENT}, receipt after the commit")
    for name, data in samples.all_kinds().items():
        receipt = await mine.add(data, name, wait="categorized")
        say(f"receipt {receipt.document_id} {show.coloured(receipt.state)}  {name}")
    try:
        await mine.add(samples.broken_pdf(), "broken.pdf")
    except HubError as exc:
        say(f"refused {exc.code}  broken.pdf  ({escape(exc.message)})")
    found = (await mine.list()).documents
    if not quiet:
        say("")
        show.documents(found)
        say("")
    return found


@contextlib.asynccontextmanager
async def _spokes(url: str) -> AsyncIterator[None]:
    """The four example spokes, each a process of its own."""
    environment = {**os.environ, "HUBPEER_NATS__URL": url}
    processes = [
        await asyncio.create_subprocess_exec(
            sys.executable, "-m", "hubpeer.cli.demo_spoke", name, env=environment, stderr=asyncio.subprocess.DEVNULL
        )
        for name in SPOKES
    ]
    try:
        yield
    finally:
        for process in processes:
            with contextlib.suppress(ProcessLookupError):
                process.terminate()
        await asyncio.gather(*(process.wait() for process in processes))


async def _all_live(hub: Client) -> None:
    """Wait for the spokes. Right after an installation the disk may be busy for a while, and everything with it."""
    until = asyncio.get_running_loop().time() + 120
    while True:
        try:
            if {a.agent for a in await hub.agents() if a.state == "live"} >= set(SPOKES):
                return
        except HubError as exc:
            if exc.code != "deadline_passed":
                raise
        if asyncio.get_running_loop().time() > until:
            raise HubError("deadline_passed", "the four spokes did not register within 120 s")
        await asyncio.sleep(0.05)
