"""What the README says is so: its Python runs, its commands exist, its files are there."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest

from hubpeer.cli.commands import cli
from tests.flow.running import Hub

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text("utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
COMMANDS = [line[2:].split("#")[0].strip() for block in re.findall(r"```console\n(.*?)```", README, re.DOTALL)
            for line in block.splitlines() if line.startswith("$ ")]  # fmt: skip


def test_the_spoke_of_the_readme_is_the_example() -> None:
    example = (ROOT / "examples" / "spoke.py").read_text("utf-8")
    assert PYTHON[0].strip() in example


def test_the_question_of_the_readme_runs(tmp_path: Path) -> None:
    hub = Hub(tmp_path / "data").start()
    code = PYTHON[1].replace("nats://127.0.0.1:4222", hub.url)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "single ['marketing']" or "marketing" in done.stdout
    assert hub.stop() == 0


@pytest.mark.parametrize("line", [c for c in COMMANDS if re.match(r"(\.venv/bin/)?hubpeer ", c)])
def test_every_command_of_the_readme_parses(line: str) -> None:
    words = shlex.split(line)[1:]
    command: click.Command = cli
    with click.Context(cli) as context:
        while isinstance(command, click.Group):
            command = command.commands[words.pop(0)]
        words = [__file__ if w in ("contract.pdf", "reports/") else w for w in words]
        command.make_context(command.name or "", words, parent=context)


def test_the_make_targets_are_there() -> None:
    makefile = (ROOT / "Makefile").read_text("utf-8")
    for target in re.findall(r"\$ make (\w+)", README):
        assert f"\n{target}:" in makefile


def test_every_link_leads_somewhere() -> None:
    for page in [ROOT / "README.md", *ROOT.glob("docs/*.md"), *ROOT.glob("docs/*/*.md")]:
        for link in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text("utf-8")):
            assert (page.parent / link).exists(), f"{page.name}: {link}"
