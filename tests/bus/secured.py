"""The secured installation: the repository's own nats.conf on a real nats-server, and a hub started as an operator would."""

from __future__ import annotations

import json
import os
import secrets
import subprocess
import sys
import sysconfig
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CONF = ROOT / "nats.conf"
AGENTS = ("finance", "marketing", "sales", "ceo")
VARIABLES = ("HUB_CORE", "HUB_FRONT", "OPS", "ACME", *(agent.upper() for agent in AGENTS))


class Secured:
    """`nats-server -c nats.conf` on free ports, with `hubpeer serve` on it."""

    def __init__(self, folder: Path, conf: Path = CONF) -> None:
        self.folder = folder
        self.passwords = {name: f"p{secrets.token_hex(8)}" for name in VARIABLES}
        environ = {**os.environ, **{f"{name}_PASSWORD": value for name, value in self.passwords.items()}}
        environ["NATS_STORE_DIR"] = str(folder / "nats")
        program = Path(sysconfig.get_path("scripts")) / "nats-server"
        # The command line wins over the file's ports, so the file itself is what runs.
        places = ["-p", "-1", "-m", "-1", "--ports_file_dir", str(folder)]
        with (folder / "nats.log").open("w") as log:
            self.server = subprocess.Popen([program, "-c", str(conf), *places], stderr=log, env=environ)
        self.url = self._found_url()
        self.hub: subprocess.Popen[str] | None = None

    def _found_url(self) -> str:
        ports = self.folder / f"nats-server_{self.server.pid}.ports"
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if self.server.poll() is not None:
                raise AssertionError((self.folder / "nats.log").read_text())
            try:
                return str(json.loads(ports.read_text())["nats"][0])
            except (OSError, ValueError):  # not there yet, or half written
                time.sleep(0.02)
        raise AssertionError("nats-server does not say its port")

    def start_hub(self) -> None:
        own = {
            "HUBPEER_NATS__USER": "hub-core",
            "HUBPEER_NATS__PASSWORD": self.passwords["HUB_CORE"],
            "HUBPEER_NATS__FRONT_USER": "hub-front",
            "HUBPEER_NATS__FRONT_PASSWORD": self.passwords["HUB_FRONT"],
            "HUBPEER_NATS__REPLY_INBOX": "own",
            "HUBPEER_NATS__BARE_INGEST": "false",
        }
        environ = {name: value for name, value in os.environ.items() if not name.startswith("HUBPEER_")} | own
        command = [sys.executable, "-m", "hubpeer", "serve", "--nats", self.url, "--data", str(self.folder / "hub")]
        with (self.folder / "hub.log").open("w") as log:
            self.hub = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True, env=environ)
        assert self.hub.stdout is not None
        line = self.hub.stdout.readline()
        assert line == f"ready {self.url}\n", (self.folder / "hub.log").read_text()[-3000:]

    def stop(self) -> None:
        for process in (self.hub, self.server):
            if process is not None:
                process.terminate()
                process.wait(timeout=60)
                if process.stdout is not None:
                    process.stdout.close()

    def access(self, user: str) -> dict[str, Any]:
        name = user.upper().replace("-", "_")
        return {"user": user, "password": self.passwords[name]}
