from __future__ import annotations

from collections.abc import AsyncIterator, Iterator
from pathlib import Path

import pytest

from tests.flow.running import Bare, Hub, bare


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    """One running hub without a model, shared by a module's tests."""
    started = Hub(tmp_path_factory.mktemp("hub") / "data").start()
    yield started
    assert started.process is not None
    assert started.process.poll() is None, f"the hub died:\n{started.log.read_text()[-3000:]}"
    assert started.stop() == 0
    assert "Traceback" not in started.log.read_text()


@pytest.fixture
async def client(hub: Hub) -> AsyncIterator[Bare]:
    async with bare(hub.url) as connected:
        yield connected


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"
