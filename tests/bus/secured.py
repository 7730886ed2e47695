"""The secured installation: the commands of docker-compose.yml and Dockerfile, with the repository's own nats.conf, started
here without Docker."""

from __future__ import annotations

import json
import os
import re
import secrets
import subprocess
import sysconfig
import time
from pathlib import Path
from typing import Any

import yaml

ROOT = Path(__file__).parents[2]
CONF = ROOT / "nats.conf"
SERVICES: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))["services"]
AGENTS = ("finance", "marketing", "sales", "ceo")
VARIABLES = ("HUB_CORE", "HUB_FRONT", "OPS", "ACME", *(agent.upper() for agent in AGENTS))


class Secured:
    """nats-server on free ports as the service `nats` starts it, and a hub on it as the service `hub` does."""

    def __init__(self, folder: Path, conf: Path = CONF) -> None:
        self.folder = folder
        self.passwords = {name: f"p{secrets.token_hex(8)}" for name in VARIABLES}
        self.environ = {f"{name}_PASSWORD": value for name, value in self.passwords.items()}
        self.environ["PATH"] = f"{sysconfig.get_path('scripts')}:{os.environ['PATH']}"
        option, path, *options = SERVICES["nats"]["command"]
        assert (option, path) == ("-c", "/etc/nats/nats.conf")
        # The command line wins over the file's ports, so the file itself is what runs.
        places = ["-p", "-1", "-m", "-1", "--ports_file_dir", str(folder)]
        with (folder / "nats.log").open("w") as log:
            self.server = subprocess.Popen(
                ["nats-server", "-c", str(conf), *options, *places],
                stderr=log,
                env={**self.environ, "NATS_STORE_DIR": str(folder / "nats")},
            )
        self.url = self._found_url()
        self.hub: subprocess.Popen[str] | None = None
        self.hub_environ = self.environ | {
            name: re.sub(r"\$\{(\w+):\?[^}]*\}", lambda m: self.environ[m[1]], value)
            for name, value in SERVICES["hub"]["environment"].items()
        }
        assert self.hub_environ["HUBPEER_NATS__URL"] == "nats://nats:4222"
        self.hub_environ["HUBPEER_NATS__URL"] = self.url
        self.hub_environ["HUBPEER_MODEL__NAME"] = "none"  # who may do what is asked here, not who fits

    def _found_url(self) -> str:
        ports = self.folder / f"nats-server_{self.server.pid}.ports"
        until = time.monotonic() + 30
        while time.monotonic() < until:
            if self.server.poll() is not None:
                raise AssertionError((self.folder / "nats.log").read_text())
            try:
                return f"nats://127.0.0.1:{json.loads(ports.read_text())['nats'][0].rsplit(':', 1)[1]}"
            except (OSError, ValueError):  # not there yet, or half written
                time.sleep(0.02)
        raise AssertionError("nats-server does not say its port")

    def start_hub(self) -> None:
        dockerfile = (ROOT / "Dockerfile").read_text("utf-8")
        [entry, command] = map(json.loads, re.findall(r"^(?:ENTRYPOINT|CMD) (\[.*\])$", dockerfile, re.MULTILINE))
        words = [str(self.folder / "hub") if word == "/data" else word for word in (*entry, *command)]
        with (self.folder / "hub.log").open("w") as log:
            self.hub = subprocess.Popen(
                words, stdout=subprocess.PIPE, stderr=log, text=True, env=self.hub_environ, cwd=self.folder
            )
        assert self.hub.stdout is not None
        line = self.hub.stdout.readline()
        assert line == f"ready {self.url}\n", (self.folder / "hub.log").read_text()[-3000:]

    def healthy(self) -> subprocess.CompletedProcess[str]:
        """What the container's health check says."""
        kind, check = SERVICES["hub"]["healthcheck"]["test"]
        assert kind == "CMD-SHELL"
        words = ["/bin/sh", "-c", check.replace("$$", "$")]
        return subprocess.run(words, env=self.hub_environ, cwd=self.folder, capture_output=True, text=True, check=False)

    def stop(self) -> None:
        codes = []
        for process in (self.hub, self.server):
            if process is not None:
                process.terminate()
                codes.append(process.wait(timeout=60))
                if process.stdout is not None:
                    process.stdout.close()
        if self.hub is not None:
            assert codes[0] == 0, "SIGTERM ends the hub in order"

    def access(self, user: str) -> dict[str, Any]:
        name = user.upper().replace("-", "_")
        return {"user": user, "password": self.passwords[name]}
