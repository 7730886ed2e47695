"""The language model, seen from the rest of the hub: one question in, one draft out.

    PlanAsk -> Model.plan       -> PlanDraft              (checked by `hubpeer.plan` before anybody acts on it)
    DocAsk  -> Model.categorize -> wire.Categorization

Importing this package does not import torch; `open_model` does, and only where the settings name a real model.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

import msgspec

from hubpeer import settings as config
from hubpeer.errors import SettingsError
from hubpeer.plan import Draft as PlanDraft
from hubpeer.plan import DraftStep
from hubpeer.wire import Card, Categorization, ConflictRule

__all__ = ["DocAsk", "DraftStep", "Model", "PlanAsk", "PlanDraft", "open_model"]


class PlanAsk(msgspec.Struct, frozen=True):
    """One question and all a planner needs for it."""

    asker: str
    query: str
    cards: dict[str, Card]  # the agents that may be named: live ones, without the asker
    rules: list[ConflictRule]
    max_agents: int = 6
    context: dict[str, Any] | None = None


class DocAsk(msgspec.Struct, frozen=True):
    """One document and all a categorizer needs for it."""

    client: str
    text: str
    taxonomy: dict[str, config.Category]
    agents: list[str]
    title: str = ""
    filename: str = ""
    headings: list[str] = []


class Model(Protocol):
    """A planner and categorizer. Deadlines are in seconds of `time.monotonic()`."""

    @property
    def name(self) -> str: ...

    @property
    def revision(self) -> str:
        """Which weights these are: a short digest, or a version."""
        ...

    async def plan(self, ask: PlanAsk, deadline: float) -> PlanDraft:
        """A draft before `deadline`. Raises `Busy("queue_full")`, `Unavailable("model_unavailable")` or
        `HubError("deadline_passed")`; canceling the call frees the model at its next step."""
        ...

    async def categorize(self, ask: DocAsk, deadline: float | None) -> Categorization:
        """The document's categorization, `method` "llm_intelligent"; raises as `plan` does."""
        ...

    def expect(self, asks: Sequence[PlanAsk]) -> None:
        """Asks like these will probably come (a card changed): prepare for them when there is nothing else to do. Their
        queries do not matter. Returns at once."""
        ...

    def status(self) -> dict[str, Any]:
        """Figures for `hub.status`: always `model_name`, `loaded`, `queue`, `memory`."""
        ...

    async def close(self) -> None:
        """Refuse what waits, stop what runs, free the memory. May be called twice."""
        ...


async def open_model(settings: config.Model) -> Model | None:
    """The language model that `settings.name` names, ready to answer; None for "builtin" and "none".

    Raises `SettingsError` (the name or a package is wrong) or `Unavailable("model_unavailable")` (it cannot be had now).
    """
    if settings.name in ("builtin", "none"):
        return None
    if settings.name.startswith("scripted:"):
        from hubpeer.model.scripted import ScriptedModel

        return ScriptedModel.read(Path(settings.name.removeprefix("scripted:")))
    try:
        return await asyncio.to_thread(_open, settings)
    except ModuleNotFoundError as exc:
        raise SettingsError(
            f"model.name = {settings.name!r} needs the package {exc.name}: pip install 'hubpeer[hub,llm]'"
        ) from exc


def _open(settings: config.Model) -> Model:
    """On a thread of its own: importing torch alone takes seconds, in which the event loop has other things to do."""
    from hubpeer.model.folder import find

    folder = find(settings.name)
    from hubpeer.model.local import LocalModel

    return LocalModel(settings, folder)


def describe(card: Card) -> str:
    """A card as one line of a prompt."""
    words = ", ".join([*card.capabilities, *card.specialties])
    return f"{card.description.strip()} ({words})" if card.description.strip() else words


def card_set(cards: Mapping[str, Card]) -> tuple[str, ...]:
    """What two askers' prompts must have in common to share their work: each agent's name and line, in name order."""
    return tuple(f"{name}: {describe(cards[name])}" for name in sorted(cards))
