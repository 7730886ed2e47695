"""Who waits for the model, who runs, who is refused. Pure: the clock is an argument.

Two kinds of job share one model. Routes are answered while somebody waits, documents whenever there is time; so routes start
first, and a document gets a step beside them only after it has starved for a while. Within a kind the client that has used the
model least is next (fair queuing by time used), and inside a client the oldest job.
"""

from __future__ import annotations

import enum
import itertools
from collections.abc import Callable
from typing import Final

import msgspec


class Kind(enum.IntEnum):
    """Smaller is more urgent."""

    ROUTE = 0
    DOCUMENT = 1


class Limits(msgspec.Struct, frozen=True):
    waiting: int = 32  # of each kind; a client may hold half of them, so that none can shut the others out
    routes: int = 8  # running at once
    documents: int = 2
    starved_s: float = 2.0  # a running document gets a step at least this often, whatever the routes do


class Ticket(msgspec.Struct, frozen=True):
    """A job's place in the line."""

    number: int
    kind: Kind
    client: str
    arrived: float
    deadline: float | None


class Refused(msgspec.Struct, frozen=True):
    """No room now; coming back after `retry_after_s` may help."""

    waiting: int
    retry_after_s: float


#: Assumed length of a job in seconds until the first ones have been measured.
FIRST_GUESS: Final = {Kind.ROUTE: 2.0, Kind.DOCUMENT: 10.0}


class Line:
    """Everyone who waits or runs. Not thread-safe: its owner locks."""

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._numbers = itertools.count(1)
        self._waiting: dict[Kind, list[Ticket]] = {kind: [] for kind in Kind}
        self._running: dict[Kind, dict[int, Ticket]] = {kind: {} for kind in Kind}
        self._seconds = dict(FIRST_GUESS)  # a job's length, smoothed
        self._used: dict[tuple[Kind, str], float] = {}  # time each client has had; only of those that wait or run
        self._served_at: float | None = None  # when a document last had a step
        self.refused = 0

    # ── in and out ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def offer(self, kind: Kind, client: str, now: float, deadline: float | None = None) -> Ticket | Refused:
        """A place, or why not: no place is free, the client has its share of them, or the deadline would pass while waiting."""
        waiting = self._waiting[kind]
        share = max(1, self._limits.waiting // 2)
        wait = self.expected_wait(kind)
        full = len(waiting) >= self._limits.waiting or sum(t.client == client for t in waiting) >= share
        if full or (deadline is not None and waiting and now + wait >= deadline):
            self.refused += 1
            return Refused(len(waiting), max(wait, 0.1))
        # Who comes anew starts level with the least served of those here: an idle client saves up no credit.
        here = [used for (k, _), used in self._used.items() if k == kind]
        self._used.setdefault((kind, client), min(here, default=0.0))
        ticket = Ticket(next(self._numbers), kind, client, now, deadline)
        waiting.append(ticket)
        return ticket

    def start(self, fits: Callable[[Ticket], bool]) -> Ticket | None:
        """The next job to run, now running; None where nobody waits, nothing fits, or enough run.

        A route that does not fit holds documents back: otherwise small documents would keep its room occupied for ever.
        """
        for kind, most in ((Kind.ROUTE, self._limits.routes), (Kind.DOCUMENT, self._limits.documents)):
            waiting = self._waiting[kind]
            if not waiting:
                continue
            if len(self._running[kind]) < most:
                ticket = min(waiting, key=lambda t: (self._used[t.kind, t.client], t.number))
                if fits(ticket):
                    waiting.remove(ticket)
                    self._running[kind][ticket.number] = ticket
                    return ticket
            if kind is Kind.ROUTE:
                return None
        return None

    def leave(self, ticket: Ticket, used_s: float = 0.0, finished: bool = False) -> None:
        """The job is over, or gave up waiting. `used_s`: model time it had. Leaving twice does no harm."""
        running = self._running[ticket.kind]
        if ticket in self._waiting[ticket.kind]:
            self._waiting[ticket.kind].remove(ticket)
        elif running.pop(ticket.number, None) is None:
            return
        key = ticket.kind, ticket.client
        self._used[key] += used_s
        if finished:
            self._seconds[ticket.kind] += 0.2 * (used_s - self._seconds[ticket.kind])
        if not any(t.client == ticket.client for t in (*self._waiting[ticket.kind], *running.values())):
            del self._used[key]

    def late(self, now: float) -> list[Ticket]:
        """Those whose deadline has passed, waiting or running."""
        everyone = [t for kind in Kind for t in (*self._waiting[kind], *self._running[kind].values())]
        return [t for t in everyone if t.deadline is not None and t.deadline <= now]

    # ── whose step ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def turn(self, now: float) -> set[Kind]:
        """Which kinds of running jobs take part in the next step."""
        routes, documents = self._running[Kind.ROUTE], self._running[Kind.DOCUMENT]
        if not documents:
            self._served_at = None
            return {Kind.ROUTE}
        starved = self._served_at is not None and now - self._served_at >= self._limits.starved_s
        if routes and not starved:
            self._served_at = now if self._served_at is None else self._served_at
            return {Kind.ROUTE}
        self._served_at = now
        return {Kind.ROUTE, Kind.DOCUMENT}

    # ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def waiting(self, kind: Kind) -> int:
        return len(self._waiting[kind])

    def running(self, kind: Kind) -> int:
        return len(self._running[kind])

    def expected_wait(self, kind: Kind) -> float:
        """Seconds until a job offered now would start, as far as one can tell."""
        ahead = [(k, len(self._waiting[k]) + len(self._running[k])) for k in Kind if k <= kind]
        slots = self._limits.routes if kind is Kind.ROUTE else self._limits.documents
        if len(self._running[kind]) < slots and not self._waiting[kind]:
            return 0.0
        return sum(n * self._seconds[k] for k, n in ahead)
