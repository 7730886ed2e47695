"""`hubpeer doctor`: what could be wrong, looked at in the order in which it would bite."""

from __future__ import annotations

import asyncio
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Literal

import msgspec

from hubpeer import __version__
from hubpeer.bus.server import OLDEST, binary
from hubpeer.client import Client
from hubpeer.errors import HubError, SettingsError
from hubpeer.settings import GiB, Settings

_NEEDED_FREE = 2 * GiB


class Check(msgspec.Struct, frozen=True):
    name: str
    state: Literal["ok", "warn", "fail"]
    text: str


async def examine(settings: Settings, client: Callable[[], Client]) -> list[Check]:
    """Every check that can be made from here; one that fails does not end the others."""
    checks = [
        Check("hubpeer", "ok", f"{__version__}, Python {platform.python_version()}, {os.cpu_count()} cores"),
        _packages(settings),
        _data(settings),
        await _server(settings),
    ]
    return [*checks, *await _hub(client)]


def _packages(settings: Settings) -> Check:
    wanted = ["lmdb", "pypdf", "docx", "lxml", "numpy", "tokenizers"]
    if settings.model.name not in ("builtin", "none") and not settings.model.name.startswith("scripted:"):
        wanted += ["torch", "transformers", "safetensors", "llguidance"]
    missing = [name for name in wanted if importlib.util.find_spec(name) is None]
    if missing:
        extra = "hub,llm" if "torch" in missing else "hub"
        return Check("packages", "fail", f"{', '.join(missing)} missing: pip install 'hubpeer[{extra}]'")
    pdfium = importlib.util.find_spec("pypdfium2") is not None
    hint = "" if pdfium else "; pip install 'hubpeer[pdf]' reads PDF text faster and better"
    return Check("packages", "ok", f"all there{hint}")


def _data(settings: Settings) -> Check:
    path = Path(settings.data)
    nearest = next(p for p in (path, *path.absolute().parents) if p.exists())
    if not os.access(nearest, os.W_OK):
        return Check("data directory", "fail", f"{path} cannot be written; choose another with --data DIR")
    free = shutil.disk_usage(nearest).free
    if free < _NEEDED_FREE:
        return Check("data directory", "warn", f"{path}: only {free / GiB:.1f} GiB free")
    return Check("data directory", "ok", f"{path}: {free / GiB:.0f} GiB free")


async def _server(settings: Settings) -> Check:
    if settings.nats.url:
        return Check("nats-server", "ok", f"yours, {settings.nats.url}")
    try:
        program = binary(settings.server)
    except SettingsError as exc:
        return Check("nats-server", "fail", str(exc))
    process = await asyncio.create_subprocess_exec(program, "--version", stdout=asyncio.subprocess.PIPE)
    output, _ = await process.communicate()
    version = output.decode().strip().rsplit("v", 1)[-1]
    have = tuple(int(part) for part in version.split("-")[0].split("."))
    if have < OLDEST:
        return Check("nats-server", "fail", f"{version} has known security holes; {'.'.join(map(str, OLDEST))} is needed")
    return Check("nats-server", "ok", f"{version}, {Path(program).name} of {Path(sys.prefix).name or 'this environment'}")


async def _hub(client: Callable[[], Client]) -> list[Check]:
    hub = client()
    try:
        await hub.open(wait_s=1.0)
    except (HubError, SettingsError) as exc:
        return [Check("bus", "fail", f"{exc}; start a hub with `hubpeer up`, or name your server with --nats URL")]
    try:
        checks = [Check("bus", "ok", f"nats-server {hub.link.server_version}, messages up to {hub.link.max_payload} bytes")]
        try:
            health = await hub.health()
        except HubError as exc:
            return [*checks, Check("hub", "fail", f"no hub answers on this bus ({exc.code}); start one with `hubpeer serve`")]
        wrong = {name: value for name, value in health.checks.items() if value not in ("ok", "none")}
        checks.append(
            Check("hub", "warn", ", ".join(f"{k}: {v}" for k, v in wrong.items())) if wrong else Check("hub", "ok", "answers")
        )
        status = await hub.status()
        differences = status.bus.get("differences", [])
        checks += [Check("configuration", "warn", f"{difference}; left as it is") for difference in differences]
        asleep = [name for name, state in status.agents.items() if state in ("expired", "left")]
        if asleep:
            checks.append(Check("agents", "warn", f"not running: {', '.join(asleep)}"))
        return checks
    finally:
        await hub.close()
