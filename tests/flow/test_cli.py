"""The command line: every command, its help, its exit codes, and nothing left behind."""

from __future__ import annotations

import contextlib
import json
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from click.testing import CliRunner

from hubpeer.cli.commands import cli
from tests import makers
from tests.flow.running import Hub, wait_until


class Done(NamedTuple):
    returncode: int
    stdout: str
    stderr: str


def run(*arguments: str, hub: Hub | None = None, cwd: Path | None = None, **environ: str) -> Done:
    """The command in this process, which is a second faster than in one of its own."""
    if hub is not None:
        environ["HUBPEER_NATS__URL"] = hub.url
    with contextlib.chdir(cwd or Path.cwd()):
        result = CliRunner().invoke(cli, arguments, env=environ, prog_name="hubpeer")
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exc_info
    return Done(result.exit_code, result.stdout, result.stderr)


def ok(*arguments: str, hub: Hub | None = None) -> str:
    done = run(*arguments, hub=hub)
    assert done.returncode == 0, done.stderr + done.stdout
    return done.stdout


def test_it_is_installed_as_a_command() -> None:
    command = [Path(sys.executable).with_name("hubpeer"), "--version"]
    assert "hubpeer, version" in subprocess.run(command, capture_output=True, text=True, check=True).stdout


def read(*arguments: str, hub: Hub | None = None) -> Any:
    return json.loads(ok(*arguments, "--json", hub=hub))


COMMANDS = [
    [], ["up"], ["serve"], ["demo"], ["route"], ["plans"], ["plans", "list"], ["plans", "show"], ["plans", "approve"],
    ["plans", "cancel"], ["replay"], ["agents"], ["docs"], ["docs", "add"], ["docs", "ls"], ["docs", "show"], ["docs", "text"],
    ["docs", "rm"], ["docs", "stats"], ["status"], ["doctor"], ["eval"], ["eval", "routes"],
    ["eval", "documents"], ["eval", "compare"],
]  # fmt: skip


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_every_command_explains_itself(command: list[str]) -> None:
    text = ok(*command, "--help")
    assert text.startswith("Usage: ")
    assert len(text.splitlines()) > 4
    groups = ([], ["plans"], ["docs"], ["eval"])
    assert command in groups or "--json" in text


def test_help_knows_every_command_there_is() -> None:
    names = {" ".join(c) for c in COMMANDS if c}
    for name, command in cli.commands.items():
        assert name in names
        for below in getattr(command, "commands", {}):
            assert f"{name} {below}" in names


def test_a_question_and_its_plan(hub: Hub) -> None:
    text = ok("route", "--as", "ceo", "what does the campaign cost", "--dry-run", hub=hub)
    assert "sequential by fallback_keywords (no_model), consensus_required, about 6 min" in text
    assert text.index("finance") < text.index("marketing")
    decision = read("route", "--as", "ceo", "what does the campaign cost", "--dry-run", hub=hub)["routing_decision"]
    plan_id = decision["plan_id"]
    assert plan_id in ok("plans", "--as", "ceo", "--state", "proposed", hub=hub)
    assert "plan proposed" in ok("plans", "show", "--as", "ceo", plan_id, hub=hub)
    assert read("plans", "approve", "--as", "ceo", plan_id, hub=hub)["state"] == "running"
    assert "canceled" in ok("plans", "cancel", "--as", "ceo", plan_id, hub=hub)
    assert run("plans", "show", "--as", "sales", plan_id, hub=hub).returncode == 1


def test_documents(hub: Hub, tmp_path: Path) -> None:
    folder = tmp_path / "reports"
    folder.mkdir()
    (folder / "a.pdf").write_bytes(makers.pdf(["Invoice 7. Amount due 100 EUR. VAT."]))
    (folder / "b.txt").write_text("Minutes of the meeting. Present: Ana. Action items: none.")
    first, second = read("docs", "add", "--client", "cli", str(folder), hub=hub)
    assert first["categorization"]["category"] == "invoice"
    assert "a.pdf" in ok("docs", "ls", "--client", "cli", hub=hub)
    assert read("docs", "ls", "--client", "cli", "--category", "invoice", hub=hub)["total"] == 1
    assert "application/pdf" in ok("docs", "show", "--client", "cli", first["document_id"], hub=hub)
    assert "Amount due 100 EUR" in ok("docs", "text", "--client", "cli", first["document_id"], hub=hub)
    assert "documents" in ok("docs", "stats", "--client", "cli", hub=hub)
    assert "deleted 1" in ok("docs", "rm", "--client", "cli", second["document_id"], hub=hub)
    bad = tmp_path / "bad.pdf"
    bad.write_bytes(b"%PDF-1.4 no")
    refused = run("docs", "add", "--client", "cli", str(bad), hub=hub)
    assert refused.returncode == 1
    assert "bad_pdf" in refused.stdout
    assert "known already" in ok("docs", "add", "--client", "cli", str(folder / "a.pdf"), hub=hub)


def test_operators(hub: Hub) -> None:
    assert "hubpeer" in ok("status", hub=hub)
    status = read("status", hub=hub)
    assert status["memory_usage_mb"] > 0
    assert {"memory_usage_mb", "model_name", "model_loaded", "queue_size"} <= set(status)
    assert {a["agent"] for a in read("agents", hub=hub)} >= {"finance", "marketing", "sales", "ceo"}
    assert "configured" in ok("agents", hub=hub)
    assert "ok" in ok("doctor", hub=hub)
    assert {c["state"] for c in read("doctor", hub=hub)} <= {"ok", "warn"}


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["route", "question"], 2, "--as"),
        (["plans"], 2, "--as AGENT"),
        (["fly"], 2, "No such command"),
        (["serve"], 2, "which server?"),
        (["--config", "nowhere.toml", "status"], 2, "nowhere.toml"),
        (["--nats", "nats://127.0.0.1:1", "status"], 3, "hubpeer up"),
        (["--nats", "nats://127.0.0.1:1", "doctor"], 1, "hubpeer up"),
        (["up", "--port", "70000"], 2, "port"),
        (["up", "--port", "0", "--data", "/proc/nowhere"], 2, "data"),
        (["up", "--port", "0", "--data", "x", "--model", "./no-such-folder"], 2, "no-such-folder"),
    ],
)
def test_what_is_wrong_is_said_in_a_line(tmp_path: Path, arguments: list[str], code: int, says: str) -> None:
    done = run(*arguments, cwd=tmp_path)
    assert done.returncode == code, done.stderr + done.stdout
    assert says in done.stderr + done.stdout
    assert "Traceback" not in done.stderr


def test_an_unknown_setting_is_refused_with_its_place(tmp_path: Path) -> None:
    (tmp_path / "hubpeer.toml").write_text("[routing]\ndedline_s = 3\n")
    done = run("status", cwd=tmp_path)
    assert (done.returncode, "hubpeer.toml" in done.stderr, "dedline_s" in done.stderr) == (2, True, True)
    done = run("status", cwd=tmp_path.parent, HUBPEER_ROUTING__NOPE="1")
    assert (done.returncode, "HUBPEER_ROUTING__NOPE" in done.stderr) == (2, True)


def test_errors_are_json_too(tmp_path: Path) -> None:
    done = run("--nats", "nats://127.0.0.1:1", "status", "--json", cwd=tmp_path)
    assert json.loads(done.stdout)["error"]["code"] == "bus_unavailable"


def test_a_taken_port_is_said_plainly(hub: Hub, tmp_path: Path) -> None:
    done = run("up", "--port", str(hub.port), "--data", str(tmp_path / "d"))
    assert done.returncode == 2
    assert f"port {hub.port}" in done.stderr
    assert "--port 0" in done.stderr


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_signals_stop_all_it_started(data: Path, number: signal.Signals) -> None:
    hub = Hub(data).start()
    assert hub.family()
    assert hub.process is not None
    hub.process.send_signal(number)
    assert hub.ended() == 0
    wait_until(lambda: not hub.family(), "nothing is left running")
    assert "Traceback" not in hub.log.read_text()


def test_a_signal_while_it_starts_stops_it_too(data: Path) -> None:
    command = [sys.executable, "-m", "hubpeer", "up", "--port", "0", "--data", str(data), "--model", "none"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    wait_until(lambda: (data / "nats-server.conf").exists(), "the server is being started")
    process.terminate()
    _, err = process.communicate(timeout=60)
    assert process.returncode == 0, err
    assert "Traceback" not in err
    hub = Hub(data)
    hub.process = process
    wait_until(lambda: not hub.family(), "nothing is left running")


def test_the_demo_shows_everything_and_leaves_nothing(tmp_path: Path) -> None:
    told = read("demo", "--keep", str(tmp_path / "kept"))
    assert [r["asker"] for r in told["routes"]] == ["finance", "ceo", "marketing", "ceo"]
    assert all(r["outcome"]["status"] == "done" for r in told["routes"])
    kinds = {d["media_type"] for d in told["documents"] if d["state"] == "categorized"}
    assert {"application/pdf", "text/plain"} <= kinds
    assert any("wordprocessingml" in kind for kind in kinds)
    assert not Hub(tmp_path / "kept").family()
