"""Every command: `hubpeer --help`."""

from __future__ import annotations

import asyncio
import functools
import logging
import os
import signal
import sys
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, Concatenate, ParamSpec

import click
import msgspec
from rich.progress import Progress

from hubpeer import __version__, settings, wire
from hubpeer.cli import show
from hubpeer.client import Client
from hubpeer.errors import HubError, SettingsError
from hubpeer.settings import Settings

P = ParamSpec("P")

REFUSED, USAGE, UNREACHABLE = 1, 2, 3


class Context(msgspec.Struct):
    """What all commands share: the settings, and whether to print JSON."""

    config: Path | None
    overrides: dict[str, Any]
    json: bool = False

    def settings(self, **more: Any) -> Settings:
        given = {name.replace("__", "."): value for name, value in more.items() if value is not None}
        return settings.load(self.config, overrides={**self.overrides, **given})

    def client(self, agent: str = "", timeout_s: float = 15.0) -> Client:
        nats = self.settings().nats
        url = nats.url or f"nats://{self.settings().server.host}:{self.settings().server.port}"
        names = ("user", "password", "token", "creds", "tls_ca", "tls_cert", "tls_key")
        access = {name: getattr(nats, name) for name in names}
        return Client(url, agent=agent, timeout_s=timeout_s, **access)


def _fail(message: str, code: int, as_json: bool, error: dict[str, Any] | None = None) -> None:
    if as_json:
        show.emit({"status": "error", "error": error or {"code": "usage", "message": message}})
    click.echo(f"error: {message}", err=True)
    raise SystemExit(code)


def command(function: Callable[Concatenate[Context, P], Awaitable[None]]) -> Callable[..., None]:
    """Run an async command; errors become one line on standard error and an exit code, never a traceback."""

    @click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
    @functools.wraps(function)
    def run(as_json: bool, *args: P.args, **kwargs: P.kwargs) -> None:
        context = click.get_current_context().find_object(Context)
        assert context is not None
        context.json = as_json

        async def call() -> None:
            await function(context, *args, **kwargs)

        try:
            asyncio.run(call())
        except SettingsError as exc:
            _fail(str(exc), USAGE, as_json, {"code": "settings", "message": str(exc)})
        except HubError as exc:
            code = UNREACHABLE if exc.code in ("bus_unavailable", "deadline_passed") else REFUSED
            hint = "; is a hub running? start one with `hubpeer up`" if exc.code == "bus_unavailable" else ""
            error = {"code": exc.code, "message": exc.message, "field": exc.field, "document_id": exc.document_id}
            _fail(f"{exc}{hint}", code, as_json, {k: v for k, v in error.items() if v is not None})
        except KeyboardInterrupt:
            raise SystemExit(130) from None

    return run


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__, prog_name="hubpeer")
@click.option("--config", type=click.Path(path_type=Path, dir_okay=False), help="Settings file (default: ./hubpeer.toml).")
@click.option("--nats", metavar="URL", help="NATS server to use (default: the one `hubpeer up` starts).")
@click.option("--user", help="NATS user.")
@click.option("--password", help="NATS password; better in HUBPEER_NATS__PASSWORD.")
@click.option("--creds", type=click.Path(), help="NATS credentials file.")
@click.pass_context
def cli(
    context: click.Context, config: Path | None, nats: str | None, user: str | None, password: str | None, creds: str | None
) -> None:
    """A hub on a NATS bus: questions become plans, documents become records.

    Start with `hubpeer demo`, then `hubpeer up` in one terminal and `hubpeer route --as finance "..."` in another.

    Exit codes: 0 done, 1 the hub said no, 2 wrong usage or settings, 3 no hub there.
    """
    given = {"nats.url": nats, "nats.user": user, "nats.password": password, "nats.creds": creds}
    context.obj = Context(config, {name: value for name, value in given.items() if value is not None})


# ── running a hub ───────────────────────────────────────────────────────────────────────────────────────────────────────


def hub_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--log", type=click.Choice(["debug", "info", "warning", "error"]), help="How much to log."),
        click.option(
            "--model", metavar="MODEL", help="builtin, none, a folder, a hub name, or scripted:FILE (default: builtin)."
        ),
        click.option("--data", metavar="DIR", help="Where everything is kept (default: ./data)."),
    ):
        function = option(function)
    return function


@cli.command()
@click.option("--port", type=click.IntRange(0, 65535), help="Port of the NATS server; 0 takes a free one (default: 4222).")
@hub_options
@command
async def up(context: Context, port: int | None, data: str | None, model: str | None, log: str | None) -> None:
    """Start a NATS server of our own and a hub on it; Ctrl-C stops both.

    Prints `ready nats://HOST:PORT` once the hub answers.
    """
    if context.overrides.get("nats.url"):
        raise SettingsError("`up` starts its own server; for yours: `hubpeer serve --nats URL`")
    own = context.settings(server__port=port, data=data, model__name=model, log=log, nats__url="")
    await _serve(context, own)


@cli.command()
@click.option("--nats", "url", metavar="URL", help="The NATS server; several, separated by commas, for a cluster.")
@hub_options
@command
async def serve(context: Context, url: str | None, data: str | None, model: str | None, log: str | None) -> None:
    """Start a hub on a NATS server that is already there (credentials and TLS: see `nats` in hubpeer.toml)."""
    own = context.settings(nats__url=url, data=data, model__name=model, log=log)
    if not own.nats.url:
        raise SettingsError("which server? --nats URL, or nats.url in hubpeer.toml, or HUBPEER_NATS__URL")
    await _serve(context, own)


async def _serve(context: Context, own: Settings) -> None:
    from hubpeer.peer import Peer

    logging.basicConfig(level=own.log.upper(), format="%(asctime)s %(levelname)-7s %(name)s: %(message)s", stream=sys.stderr)
    stop = asyncio.Event()
    starting = asyncio.current_task()
    assert starting is not None
    ready = False

    def stopped() -> None:
        # Before the hub is ready there is nothing to drain: give up where we are, and close what is open.
        stop.set()
        if not ready:
            starting.cancel()

    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stopped)
    try:
        async with Peer.open(own) as peer:
            ready = True
            if context.json:
                print(msgspec.json.encode({"ready": peer.url}).decode(), flush=True)
            else:
                print(f"ready {peer.url}", flush=True)
            await peer.serve(stop)
    except asyncio.CancelledError:
        if not stop.is_set():
            raise
    finally:
        await _end_tasks()


async def _end_tasks(within_s: float = 5.0) -> None:
    """End what a closed hub has left behind, a reconnecting client's tasks above all. One that refuses to end must not keep the
    process: everything that matters is closed and on disk by now."""
    left = asyncio.all_tasks() - {asyncio.current_task()}
    for task in left:
        task.cancel()
    if left:
        _, refusing = await asyncio.wait(left, timeout=within_s)
        if refusing:
            logging.getLogger("hubpeer").error("still running, given up: %s", ", ".join(t.get_name() for t in refusing))
            failure = sys.exc_info()[1]
            failed = failure is not None and not isinstance(failure, asyncio.CancelledError)
            if failed:
                click.echo(f"error: {failure}", err=True)
            logging.shutdown()
            sys.stdout.flush()
            os._exit(REFUSED if failed else 0)


@cli.command()
@click.option("--model", metavar="MODEL", default="builtin", show_default=True, help="As for `up`.")
@click.option("--keep", metavar="DIR", help="Keep the demo's data there (default: removed).")
@command
async def demo(context: Context, model: str, keep: str | None) -> None:
    """See everything once: a server, a hub, four spokes, questions, plans, documents; then stop it all."""
    from hubpeer.cli.demo import run

    await run(context.settings(model__name=model, nats__url=""), keep, as_json=context.json)


# ── questions ───────────────────────────────────────────────────────────────────────────────────────────────────────────

as_agent = click.option("--as", "agent", required=True, metavar="AGENT", help="The agent that asks.")


@cli.command()
@as_agent
@click.argument("query")
@click.option("--context", "extra", metavar="JSON", help="An object the spokes get along with the question.")
@click.option("--dry-run", is_flag=True, help="Plan only; `hubpeer plans approve` runs it later.")
@click.option("--wait", is_flag=True, help="Wait for the outcome and show every step's result.")
@click.option("--timeout", default=30.0, show_default=True, help="Seconds to wait for the plan; with --wait, for the outcome.")
@command
async def route(context: Context, agent: str, query: str, extra: str | None, dry_run: bool, wait: bool, timeout: float) -> None:
    """Ask a question: which agents should do what, in which order?"""
    try:
        data = msgspec.json.decode(extra, type=dict[str, Any]) if extra else None
    except msgspec.DecodeError as exc:
        raise SettingsError(f"--context: {exc}") from None
    async with context.client(agent, timeout) as hub:
        decision = await hub.route(query, data, dispatch=not dry_run)
        found = await hub.outcome(decision.plan_id, timeout) if wait and not dry_run else None
    if context.json:
        show.emit({"routing_decision": decision, "outcome": found} if found else wire.RouteReply(decision))
        return
    show.plan(decision, found.steps if found else None)
    if found:
        show.outcome(found)


@cli.group(invoke_without_command=True)
@click.option("--as", "agent", metavar="AGENT", help="The agent whose plans they are.")
@click.option("--state", type=click.Choice(["proposed", "running", "done", "failed", "canceled", "expired"]))
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True)
@click.option("--json", "as_json", is_flag=True, help="Print one JSON document instead of text.")
@click.pass_context
def plans(context: click.Context, agent: str | None, state: wire.PlanState | None, limit: int, as_json: bool) -> None:
    """An agent's plans: list them, show, approve or cancel one."""
    if context.invoked_subcommand is None:
        if agent is None:
            raise click.UsageError("whose plans? --as AGENT")
        context.invoke(list_plans, agent=agent, state=state, limit=limit, as_json=as_json)


@plans.command("list")
@as_agent
@click.option("--state", type=click.Choice(["proposed", "running", "done", "failed", "canceled", "expired"]))
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True)
@command
async def list_plans(context: Context, agent: str, state: wire.PlanState | None, limit: int) -> None:
    """List them, newest first."""
    async with context.client(agent) as hub:
        found = await hub.plans(state, limit)
    show.emit(found) if context.json else show.plans(found)


def _plan_command(verb: str, text: str) -> None:
    @plans.command(verb, help=text)
    @as_agent
    @click.argument("plan_id")
    @command
    async def act(context: Context, agent: str, plan_id: str) -> None:
        async with context.client(agent) as hub:
            found = await hub.plan(verb, plan_id)
        if context.json:
            show.emit(found)
            return
        show.console.print(f"plan {show.coloured(found.state)}, {found.updated_at}")
        show.plan(found.plan, found.steps)
        if found.outcome:
            show.outcome(found.outcome)


_plan_command("show", "Show a plan and how far each step is.")
_plan_command("approve", "Run a plan that was made with --dry-run.")
_plan_command("cancel", "Call a plan off; steps nobody has taken yet are taken back.")


@cli.command()
@as_agent
@click.argument("plan_id")
@command
async def replay(context: Context, agent: str, plan_id: str) -> None:
    """Decide a plan's question again, from the cards of that time: does today's model decide the same?

    Nothing is kept or published. The plan must be one of AGENT's and not older than `plans.keep_h`.
    """
    async with context.client(agent, 30.0) as hub:
        found = await hub.replay(plan_id)
    show.emit(found) if context.json else show.replay(found)


@cli.command()
@command
async def agents(context: Context) -> None:
    """List the agents: their cards, and which may be asked."""
    async with context.client() as hub:
        found = await hub.agents()
    show.emit(found) if context.json else show.agents(found)


# ── documents ───────────────────────────────────────────────────────────────────────────────────────────────────────────

of_client = click.option("--client", required=True, metavar="CLIENT", help="The owner of the documents.")


@cli.group()
def docs() -> None:
    """A client's documents."""


@docs.command()
@of_client
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path, exists=True))
@click.option(
    "--source-id", help="Your own id of the document (one file): sending it again is harmless, new bytes are a new version."
)
@click.option("--no-wait", is_flag=True, help="Return after the commit, before the category is known.")
@command
async def add(context: Context, client: str, files: tuple[Path, ...], source_id: str | None, no_wait: bool) -> None:
    """Give the hub files, or folders of files; one receipt each. Exit code 1 where one was refused."""
    paths = [p for f in files for p in (sorted(q for q in f.rglob("*") if q.is_file()) if f.is_dir() else [f])]
    if source_id and len(paths) != 1:
        raise SettingsError("--source-id goes with one file")
    wait = "committed" if no_wait else "categorized"
    results: list[dict[str, Any]] = []
    async with context.client(timeout_s=120) as hub:
        mine = hub.docs(client)
        with Progress(console=show.console, disable=len(paths) < 2 or context.json, transient=True) as progress:
            for path in progress.track(paths, description="adding"):
                try:
                    data = await asyncio.to_thread(path.read_bytes)
                    receipt = await mine.add(data, path.name, source_id=source_id or "", wait=wait)
                except (HubError, OSError) as exc:
                    refused = exc if isinstance(exc, HubError) else HubError("unreadable_file", str(exc.strerror))
                    if refused.code == "bus_unavailable":
                        raise
                    error = {"code": refused.code, "message": refused.message}
                    results.append({"file": str(path), "status": "error", "error": error})
                    if not context.json:
                        show.refusal(refused, path)
                    continue
                results.append({"file": str(path), **msgspec.to_builtins(receipt)})
                if not context.json:
                    show.receipt(receipt, path)
    if context.json:
        show.emit(results)
    if any(result["status"] == "error" for result in results):
        raise SystemExit(REFUSED)


@docs.command("ls")
@of_client
@click.option("--category", help="Only this category.")
@click.option("--state", type=click.Choice(["committed", "categorized", "failed"]))
@click.option("--limit", type=click.IntRange(1, 200), default=50, show_default=True)
@click.option("--after", help="The `next` of the page before.")
@command
async def list_docs(
    context: Context, client: str, category: str | None, state: wire.DocState | None, limit: int, after: str | None
) -> None:
    """List documents, newest first."""
    async with context.client() as hub:
        found = await hub.docs(client).list(category, state, limit, after)
    if context.json:
        show.emit(found)
        return
    show.documents(found.documents)
    more = f"; more: --after {found.next}" if found.next else ""
    show.console.print(f"[dim]{len(found.documents)} of {found.total}{more}[/]")


@docs.command("show")
@of_client
@click.argument("document_id")
@command
async def show_doc(context: Context, client: str, document_id: str) -> None:
    """Show what is known of a document."""
    async with context.client() as hub:
        found = await hub.docs(client).get(document_id)
    show.emit(found) if context.json else show.document(found)


@docs.command()
@of_client
@click.argument("document_id")
@command
async def text(context: Context, client: str, document_id: str) -> None:
    """Print a document's text."""
    async with context.client() as hub:
        found = await hub.docs(client).text(document_id)
    show.emit({"document_id": document_id, "text": found}) if context.json else click.echo(found)


@docs.command("rm")
@of_client
@click.argument("document_ids", nargs=-1, required=True)
@command
async def remove(context: Context, client: str, document_ids: tuple[str, ...]) -> None:
    """Delete documents."""
    async with context.client() as hub:
        for document_id in document_ids:
            await hub.docs(client).delete(document_id)
    show.emit({"deleted": document_ids}) if context.json else click.echo(f"deleted {len(document_ids)}")


@docs.command("stats")
@of_client
@command
async def doc_stats(context: Context, client: str) -> None:
    """Count a client's documents, bytes and categories."""
    async with context.client() as hub:
        found = await hub.docs(client).stats()
    if context.json:
        show.emit(found)
        return
    rows: dict[str, Any] = msgspec.to_builtins(found)
    show.pairs({name.replace("_", " "): str(value) for name, value in rows.items() if name != "status"})


# ── operating ───────────────────────────────────────────────────────────────────────────────────────────────────────────


@cli.command()
@command
async def status(context: Context) -> None:
    """Show how the hub is: memory, model, queues, agents, streams, stores. Exit code 1 where it is degraded."""
    async with context.client(timeout_s=5) as hub:
        found = await hub.status()
    show.emit(found) if context.json else show.status(found)
    if found.status != "ok":
        raise SystemExit(REFUSED)


@cli.command()
@command
async def doctor(context: Context) -> None:
    """Check this machine, the settings, the bus and the hub, and say what to do where something is wrong."""
    from hubpeer.cli.doctor import examine

    found = await examine(context.settings(), context.client)
    if context.json:
        show.emit(found)
    else:
        for check in found:
            mark = {"ok": "[green]ok[/]  ", "warn": "[yellow]warn[/]", "fail": "[red]fail[/]"}[check.state]
            show.console.print(f"{mark} {check.name}: {check.text}", markup=True)
    if any(check.state == "fail" for check in found):
        raise SystemExit(REFUSED)


from hubpeer.cli import evaluation as evaluation  # noqa: E402  (registers `hubpeer eval`)
