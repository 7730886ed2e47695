from __future__ import annotations

import asyncio
import os
import signal
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from hubpeer.bus.jetstream import JetStream
from hubpeer.bus.server import OLDEST, EmbeddedServer
from hubpeer.errors import SettingsError, Unavailable
from hubpeer.settings import Server
from tests.bus.helpers import linked, until


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except FileNotFoundError:
        return False


async def test_it_starts_answers_and_stops_without_a_trace(tmp_path: Path) -> None:
    server = EmbeddedServer(Server(port=0), tmp_path / "new" / "data")
    assert server.pid is None
    await server.start()
    pid = server.pid
    assert pid is not None
    assert server.url == f"nats://127.0.0.1:{server.port}"
    async with linked(server) as link:
        assert tuple(int(p) for p in link.server_version.split(".")) >= OLDEST
        assert (await JetStream(link).api("INFO"))["streams"] == 0
    config = tmp_path / "new" / "data" / "nats-server.conf"
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert stat.S_IMODE(config.parent.stat().st_mode) == 0o700
    assert 'sync_interval: "always"' in config.read_text()
    await server.stop()
    await server.stop()
    assert not alive(pid)
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1)


async def test_a_config_others_could_read_is_closed_to_them(tmp_path: Path) -> None:
    config = tmp_path / "nats-server.conf"
    config.write_text("# left by somebody")
    config.chmod(0o644)
    server = EmbeddedServer(Server(port=0), tmp_path)
    await server.start()
    await server.stop()
    assert stat.S_IMODE(config.stat().st_mode) == 0o600
    assert server.core_password in config.read_text()


async def test_a_taken_port_is_named_with_two_ways_out(tmp_path: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(SettingsError, match=rf"port {port} .* is taken; use --port 0 .* or `hubpeer serve --nats"):
            await EmbeddedServer(Server(port=port), tmp_path).start()


@pytest.mark.parametrize("binary, error", [("/nowhere/nats-server", SettingsError), ("/bin/false", Unavailable)])
async def test_a_program_that_is_none_is_told_apart(tmp_path: Path, binary: str, error: type[Exception]) -> None:
    with pytest.raises(error):
        await EmbeddedServer(Server(port=0, binary=binary), tmp_path).start()


async def test_a_data_directory_that_cannot_be_is_a_setting(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match="data directory"):
        await EmbeddedServer(Server(port=0), tmp_path / "file" / "data").start()


async def test_killed_it_is_back_on_the_same_port_with_all_it_had(tmp_path: Path) -> None:
    server = EmbeddedServer(Server(port=0), tmp_path)
    await server.start()
    try:
        async with linked(server) as link:
            js = JetStream(link)
            await js.ensure_stream({"name": "S", "subjects": ["s"]})
            acks = [await js.publish("s", b"%d" % i) for i in range(20)]
            port, pid = server.port, server.pid
            assert pid is not None
            os.kill(pid, signal.SIGKILL)
            await until(lambda: server.restarts == 1 and server.pid not in (None, pid) and link.connected, "it is back")
            assert server.port == port
            found = await js.publish("s", b"after", within_s=30)
            assert found.seq == acks[-1].seq + 1
            assert (await js.stream_state("S"))["messages"] == 21
    finally:
        pid = server.pid
        await server.stop()
    assert pid is not None
    assert not alive(pid)


async def test_it_does_not_outlive_a_hub_that_is_killed(tmp_path: Path) -> None:
    script = f"""
import asyncio, pathlib
from hubpeer.bus.server import EmbeddedServer
from hubpeer.settings import Server
async def main():
    server = EmbeddedServer(Server(port=0), pathlib.Path({str(tmp_path)!r}))
    await server.start()
    print(server.pid, flush=True)
    await asyncio.Event().wait()
asyncio.run(main())
"""
    hub = await asyncio.create_subprocess_exec(sys.executable, "-c", script, stdout=subprocess.PIPE)
    assert hub.stdout is not None
    pid = int(await hub.stdout.readline())
    assert alive(pid)
    hub.kill()
    await hub.wait()
    await until(lambda: not alive(pid), "the server follows its hub")
