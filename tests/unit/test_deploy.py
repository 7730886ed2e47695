"""What an operator copies says what the code does: hubpeer.toml.example, docker-compose.yml, Dockerfile."""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

from hubpeer import settings
from hubpeer.settings import GiB, Settings

ROOT = Path(__file__).parents[2]
EXAMPLE = ROOT / "hubpeer.toml.example"


def names(value: Any, prefix: str = "") -> Iterator[str]:
    for field in msgspec.structs.fields(type(value)):
        inner = getattr(value, field.name)
        if isinstance(inner, msgspec.Struct):
            yield from names(inner, f"{prefix}{field.name}.")
        else:
            yield prefix + field.name


def test_the_example_is_exactly_the_defaults(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    loaded = settings.load(EXAMPLE, environ={})
    assert loaded == settings.load(environ={}) == Settings()


def test_the_example_names_every_setting_and_explains_each_in_a_line() -> None:
    written = tomllib.loads(EXAMPLE.read_text("utf-8"))
    for name in names(Settings()):
        value: Any = written
        for part in name.split("."):
            assert part in value, f"{name} is missing"
            value = value[part]
    for line in EXAMPLE.read_text("utf-8").splitlines():
        if re.match(r"\w+ = ", line):
            assert re.search(r"  # \S", line), line
        assert len(line) <= 128, line


# ── docker-compose.yml: the part of the compose specification it uses, checked by hand ──────────────────────────────────

COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
KNOWN = {
    "image", "build", "command", "environment", "volumes", "ports", "healthcheck", "restart", "depends_on", "mem_limit",
    "stop_grace_period",
}  # fmt: skip


def test_compose_uses_known_keys_and_names_what_there_is() -> None:
    assert set(COMPOSE) == {"services", "volumes"}
    for name, service in COMPOSE["services"].items():
        assert set(service) <= KNOWN, name
        assert ("image" in service) != ("build" in service)
        for volume in service.get("volumes", []):
            source, target = volume.split(":")[:2]
            assert target.startswith("/")
            assert source in COMPOSE["volumes"] or (ROOT / source).exists(), volume
        for other, how in service.get("depends_on", {}).items():
            assert other in COMPOSE["services"]
            assert how == {"condition": "service_healthy"}
            assert "healthcheck" in COMPOSE["services"][other]
        assert service["healthcheck"]["test"][0] in ("CMD", "CMD-SHELL")
        assert set(service["healthcheck"]) <= {"test", "interval", "timeout", "retries", "start_period"}
        assert all(isinstance(value, str) for value in service["environment"].values())
        for port in service.get("ports", []):
            assert port.startswith("127.0.0.1:"), "nothing is open to other machines by default"


def test_compose_asks_for_every_password_of_nats_conf_and_knows_none() -> None:
    wanted = set(re.findall(r"password: \$(\w+)", (ROOT / "nats.conf").read_text("utf-8")))
    given = COMPOSE["services"]["nats"]["environment"]
    assert {name for name in given if name.endswith("_PASSWORD")} == wanted
    for service in COMPOSE["services"].values():
        for name, value in service["environment"].items():
            if "PASSWORD" in name:
                assert re.fullmatch(r"\$\{(\w+):\?set \1\}", value), name


def test_compose_gives_the_hub_settings_that_exist_and_four_gigabytes() -> None:
    hub = COMPOSE["services"]["hub"]
    environ = {name: value for name, value in hub["environment"].items() if name.startswith("HUBPEER_")}
    loaded = settings.load(environ=environ)
    assert (loaded.nats.url, loaded.nats.user, loaded.nats.front_user) == ("nats://nats:4222", "hub-core", "hub-front")
    assert (loaded.nats.reply_inbox, loaded.nats.bare_ingest) == ("own", False)
    assert hub["mem_limit"] == "4g"
    assert loaded.model.kv_memory + loaded.documents.workers * loaded.documents.memory < 4 * GiB
    assert int(hub["stop_grace_period"].removesuffix("s")) > loaded.service.drain_s


def test_the_image_runs_as_nobody_in_particular_and_copies_what_it_needs() -> None:
    lines = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text("utf-8")).splitlines()
    told = {line.split()[0]: line for line in lines if line and not line.startswith("#")}
    assert told["FROM"] == "FROM python:3.11-slim"
    assert told["USER"] == "USER hubpeer"
    assert '-c constraints.txt ".[hub]"' in told["RUN"]
    assert json.loads(told["ENTRYPOINT"].removeprefix("ENTRYPOINT ")) == ["hubpeer"]
    assert "HEALTHCHECK" in told
    ignored = (ROOT / ".dockerignore").read_text().split()
    for line in lines:
        if line.startswith("COPY"):
            for source in line.split()[1:-1]:
                assert (ROOT / source).exists(), source
                assert source not in ignored
