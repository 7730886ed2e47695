"""A model that says exactly what its script says: for tests of the hub, demonstrations and measuring the hub alone.

The script is a JSON file, or the same as objects:

    {"plans":     {"<query>": {"draft": {"agents": [{"agent": "sales", "task": "..."}], "conflict_resolution": null}}},
     "documents": {"<file name>": {"categorization": {"category": "contract", ...}}}}

`"*"` answers whatever has no entry of its own. Beside or instead of an answer an entry may say `"wait_s": 2` (answer only
then; a deadline that comes first wins) or `"error": "queue_full"` (raise that code).
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec

from hubpeer.errors import STATUS, Busy, HubError, SettingsError, Unavailable
from hubpeer.model import DocAsk, PlanAsk, PlanDraft
from hubpeer.wire import Categorization


class Entry(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What to do about one query or document."""

    draft: PlanDraft | None = None
    categorization: Categorization | None = None
    error: str | None = None
    wait_s: float = 0.0


class Script(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    plans: dict[str, Entry] = {}
    documents: dict[str, Entry] = {}


class ScriptedModel:
    """See `hubpeer.model.Model`. `asked` keeps every ask in the order it came, for tests to look at."""

    name = "scripted"
    revision = "script"

    def __init__(
        self,
        plans: Mapping[str, Entry | PlanDraft] | None = None,
        documents: Mapping[str, Entry | Categorization] | None = None,
    ) -> None:
        self._plans = {k: v if isinstance(v, Entry) else Entry(draft=v) for k, v in (plans or {}).items()}
        self._documents = {k: v if isinstance(v, Entry) else Entry(categorization=v) for k, v in (documents or {}).items()}
        self._waiting = 0
        self._closed = False
        self.asked: list[PlanAsk | DocAsk] = []

    @classmethod
    def read(cls, path: Path) -> ScriptedModel:
        try:
            script = msgspec.json.decode(path.read_bytes(), type=Script)
        except OSError as exc:
            raise SettingsError(f"the script {path} of the scripted model cannot be read: {exc.strerror}") from exc
        except msgspec.DecodeError as exc:
            raise SettingsError(f"the script {path} of the scripted model is wrong: {exc}") from exc
        for name, entry in [*script.plans.items(), *script.documents.items()]:
            if entry.error is not None and entry.error not in STATUS:
                raise SettingsError(f"the script {path}: {name!r} raises the unknown code {entry.error!r}")
        return cls(script.plans, script.documents)

    async def plan(self, ask: PlanAsk, deadline: float) -> PlanDraft:
        self.asked.append(ask)
        entry = await self._act(self._plans.get(ask.query) or self._plans.get("*"), deadline)
        if entry.draft is None:
            raise Unavailable("model_unavailable", "the script has no plan for this query")
        return entry.draft

    async def categorize(self, ask: DocAsk, deadline: float | None) -> Categorization:
        self.asked.append(ask)
        entry = await self._act(self._documents.get(ask.filename) or self._documents.get("*"), deadline)
        if entry.categorization is None:
            raise Unavailable("model_unavailable", "the script has no categorization for this document")
        return entry.categorization

    async def _act(self, entry: Entry | None, deadline: float | None) -> Entry:
        if self._closed:
            raise Unavailable("model_unavailable", "the model is closed")
        entry = entry or Entry()
        left = None if deadline is None else deadline - time.monotonic()
        if entry.wait_s or (left is not None and left <= 0):
            self._waiting += 1
            try:
                await asyncio.sleep(max(0.0, entry.wait_s if left is None else min(entry.wait_s, left)))
            finally:
                self._waiting -= 1
            if left is not None and left <= entry.wait_s:
                raise HubError("deadline_passed", "the deadline passed before the model had an answer")
        if entry.error is not None:
            if STATUS[entry.error] == 429:
                raise Busy(entry.error, "so says the script", retry_after_ms=1000)
            kind = Unavailable if STATUS[entry.error] == 503 else HubError
            raise kind(entry.error, "so says the script")
        return entry

    def expect(self, asks: Sequence[PlanAsk]) -> None:
        """A script needs no preparation."""

    def status(self) -> dict[str, Any]:
        return {
            "model_name": self.name,
            "loaded": not self._closed,
            "queue": {"waiting": self._waiting, "running": 0},
            "memory": {},
        }

    async def close(self) -> None:
        self._closed = True
