"""Every example runs as it stands, against a real hub."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.flow.running import Hub, bare

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    started = Hub(tmp_path_factory.mktemp("examples") / "data").start()
    yield started
    assert started.stop() == 0


def start(hub: Hub, name: str, *arguments: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "HUBPEER_NATS__URL": hub.url, "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    return subprocess.Popen(command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)


def finish(process: subprocess.Popen[str]) -> str:
    output, _ = process.communicate(timeout=60)
    assert process.returncode == 0, output
    return output


async def live(hub: Hub, agent: str) -> None:
    async with bare(hub.url) as client:
        while (await client.reply(f"hub.agents.show.{agent}"))["agent"]["state"] != "live":
            pass


def test_no_example_is_forgotten() -> None:
    tested = Path(__file__).read_text("utf-8")
    assert [file.name for file in EXAMPLES.glob("*.py") if f'"{file.name}"' not in tested] == []


async def test_a_spoke_and_a_question(hub: Hub) -> None:
    spoke = start(hub, "spoke.py")
    await live(hub, "finance")
    output = finish(start(hub, "ask.py", "what does the budget look like?"))
    assert "finance: done {'answer': 'finance looked into" in output
    spoke.send_signal(signal.SIGINT)
    assert "Traceback" not in finish(spoke)


async def test_a_spoke_with_verdicts(hub: Hub) -> None:
    spoke = start(hub, "verdicts.py")
    await live(hub, "sales")
    assert "sales: done {'deals': 12, 'read': []}" in finish(start(hub, "ask.py", "what is in the pipeline?"))
    spoke.terminate()
    finish(spoke)


def test_documents(hub: Hub, tmp_path: Path) -> None:
    good, bad = tmp_path / "invoice.txt", tmp_path / "bad.pdf"
    good.write_text("Invoice 7. Amount due 100 EUR, VAT included, payment within 30 days.")
    bad.write_bytes(b"%PDF-1.4 broken")
    output = finish(start(hub, "publish_documents.py", str(good), str(bad)))
    assert "invoice.txt" in output
    assert "bad.pdf refused: bad_pdf" in output
    assert "accepted as number" in output


async def test_bare_client_and_bare_spoke(hub: Hub) -> None:
    spoke = start(hub, "bare_spoke.py")
    await live(hub, "marketing")
    assert "single ['marketing']" in finish(start(hub, "bare_client.py"))
    output = finish(spoke)
    assert "step 1 of" in output
