"""The engine: one thread, one model, many jobs. Each step it schedules, runs and settles.

A job is a story (a generator) that yields lists of requests: `Read` a stretch of text, `Choose` among options, `Write` a line.
The requests of one list go through the model side by side, and with them those of all other jobs whose turn it is; when
the last of a list is done, the story goes on with their answers. Between two steps jobs come, leave, are canceled or run late.

    prefix (shared, cached) ─ the job's own line ─┬─ a choice
                                                  ├─ a text
                                                  └─ a text            each branch is a node in the forward pass's memory
"""

from __future__ import annotations

import logging
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final

import msgspec
import torch
from torch import Tensor

from hubpeer.errors import Busy, HubError, Unavailable
from hubpeer.jobs import Kind, Limits, Line, Refused, Ticket
from hubpeer.model.forward import SHORT, Feed, Forward, Memory, Node, units
from hubpeer.model.load import Weights, trim
from hubpeer.model.prompt import Words
from hubpeer.model.requests import (
    Branch,
    Choose,
    Choosing,
    Draw,
    Request,
    Row,
    Space,
    Story,
    Task,
    Text,
    Write,
    Writing,
    reading,
)

log = logging.getLogger("hubpeer.model")

#: Tokens of long texts read in one step: as much as a route may have to wait for before its own first step.
CHUNK: Final = 256


class _Prefix:
    """The start of some prompts, read once."""

    def __init__(self, tokens: tuple[int, ...], node: Node) -> None:
        self.tokens, self.node, self.users = tokens, node, 0
        self.row = Row(tokens, node=node)


class Job:
    """One task on its way."""

    def __init__(self, task: Task, finish: Callable[[Any, BaseException | None], None]) -> None:
        self.task = task
        self.finish = finish  # called once, on the engine's thread
        self.ticket: Ticket
        self.canceled = False
        self.story: Story
        self.prefix: _Prefix
        self.room: Space
        self.first = 0  # of its part of the memory
        self.size = 0
        self.requests: list[Request] = []  # those that wait for a long stretch to be read
        self.answers: list[Callable[[], Any]] = []
        self.rows: list[Row] = []
        self.used_s = 0.0
        self.drawn = 0  # random numbers handed out, so that each request has its own

    def cancel(self) -> None:
        """From any thread; takes effect between two steps."""
        self.canceled = True


class Counts(msgspec.Struct):
    """What `status` reports; only ever grows."""

    finished: int = 0
    canceled: int = 0
    late: int = 0
    failed: int = 0
    steps: int = 0
    read_tokens: int = 0  # in steps with a long row
    read_s: float = 0.0
    written_tokens: int = 0  # in steps of short rows only
    written_s: float = 0.0
    forced_tokens: int = 0
    prefix_hits: int = 0
    prefix_misses: int = 0
    prefix_evicted: int = 0
    prefix_ahead: int = 0  # read in idle time
    reused_tokens: int = 0


class Engine:
    """Owns the memory. All methods but `submit`, `expect`, `stop` and the figures belong to the thread that runs `serve`."""

    def __init__(
        self,
        weights: Weights,
        words: Words,
        tokens: int,
        limits: Limits,
        temperature: float = 0.0,
        seed: int = 0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._clock = clock
        self.weights, self.words, self.limits = weights, words, limits
        self.temperature, self.seed = temperature, seed
        self.counts = Counts()
        self.memory = Memory(weights, tokens)
        self.forward = Forward(weights, self.memory)
        self._space = Space(0, self.memory.tokens)
        self._prefixes: OrderedDict[tuple[int, ...], _Prefix] = OrderedDict()  # least recently used first
        self._ahead: OrderedDict[tuple[int, ...], None] = OrderedDict()  # prefixes to read in idle time
        self._line = Line(limits)
        self._jobs: dict[int, Job] = {}  # by ticket: waiting and running
        self._running: list[Job] = []
        self._lock = threading.Condition()
        self._stopped: HubError | None = None
        self.step_began: float | None = None  # for the watchdog: monotonic, while a step runs
        self._litter = False  # a job left, or a long stretch was read, since memory was trimmed

    # ── from any thread ─────────────────────────────────────────────────────────────────────────────────────────────────

    def submit(self, job: Job, kind: Kind, client: str, deadline: float | None) -> None:
        """Get in line. Raises `Busy("queue_full")` with the expected wait, or `Unavailable` where the engine has stopped."""
        task = job.task
        need = units(len(task.prefix)) + units(task.line) + units(task.widest)
        # Documents never get more than half, so that routes always find room.
        if need > self.memory.tokens // (1 if kind is Kind.ROUTE else 2):
            raise Unavailable("model_unavailable", "the model's memory (model.kv_memory) is too small for this")
        with self._lock:
            if self._stopped is not None:
                raise self._stopped
            offered = self._line.offer(kind, client, self._clock(), deadline)
            if isinstance(offered, Refused):
                raise Busy(
                    "queue_full",
                    f"{offered.waiting} jobs wait for the model; try again in {offered.retry_after_s:.0f} s",
                    retry_after_ms=int(offered.retry_after_s * 1000),
                )
            job.ticket = offered
            self._jobs[offered.number] = job
            self._lock.notify()

    def expect(self, prefixes: Iterable[list[int]]) -> None:
        """Read these prefixes when there is nothing else to do; the newest wish wins where there are too many."""
        with self._lock:
            for tokens in prefixes:
                self._ahead[tuple(tokens)] = None
                self._ahead.move_to_end(tuple(tokens))
            while len(self._ahead) > 16:
                self._ahead.popitem(last=False)
            self._lock.notify()

    def wake(self) -> None:
        with self._lock:
            self._lock.notify()

    def stop(self, reason: HubError) -> list[Job]:
        """Take no more jobs; `serve` returns after its step. Returns the jobs it had, all of them now without an engine."""
        with self._lock:
            if self._stopped is None:
                self._stopped = reason
            left = list(self._jobs.values())
            self._jobs.clear()
            self._lock.notify()
        return left

    @property
    def stopped(self) -> bool:
        return self._stopped is not None

    def release(self) -> None:
        """After `stop`, when nothing runs any more: let go of the large things, while the figures stay."""
        empty = torch.empty(0)
        self.memory.k, self.memory.v = empty, empty
        del self.weights, self.forward

    def figures(self) -> dict[str, Any]:
        with self._lock:
            line = self._line
            queue = {
                "waiting": line.waiting(Kind.ROUTE) + line.waiting(Kind.DOCUMENT),
                "running": line.running(Kind.ROUTE) + line.running(Kind.DOCUMENT),
                "routes_waiting": line.waiting(Kind.ROUTE),
                "documents_waiting": line.waiting(Kind.DOCUMENT),
                "refused": line.refused,
                "expected_wait_s": round(line.expected_wait(Kind.ROUTE), 2),
            }
        c = self.counts
        return {
            "queue": queue,
            "jobs": {"finished": c.finished, "canceled": c.canceled, "late": c.late, "failed": c.failed},
            "tokens_per_s": {
                "read": round(c.read_tokens / c.read_s, 1) if c.read_s else 0.0,
                "written": round(c.written_tokens / c.written_s, 1) if c.written_s else 0.0,
            },
            "prefix_cache": {
                "entries": len(self._prefixes),
                "hits": c.prefix_hits,
                "misses": c.prefix_misses,
                "read_ahead": c.prefix_ahead,
                "evicted": c.prefix_evicted,
                "reused_tokens": c.reused_tokens,
            },
            "kv": {"bytes": self.memory.nbytes, "tokens": self.memory.tokens, "free_tokens": self._space.free},
        }

    # ── the loop ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def serve(self) -> None:
        """Work until `stop`. Whatever a step raises leaves here, with every job still in `_jobs`."""
        while True:
            with self._lock:
                while self._stopped is None and not self._jobs and not self._ahead and self._unfinished() is None:
                    self._lock.wait()
                if self._stopped is not None:
                    return
            worked = self.step()
            if self._litter:
                self._litter = False
                trim()  # what lies free between the blocks of others adds up to a hundred megabytes
            if not worked:
                # Jobs wait for room that only running ones can give back, so this is rare: somebody was just canceled.
                with self._lock:
                    if self._stopped is None and self._jobs:
                        self._lock.wait(0.01)

    def step(self) -> bool:
        """One step; False where there was nothing to do."""
        now = self._clock()
        batch = self._schedule(now)
        if not batch:
            return False
        self.step_began = now
        with torch.inference_mode():
            logits = self._run(batch)
            self._settle(batch, logits, self._clock() - now)
        self.step_began = None
        return True

    def _schedule(self, now: float) -> list[tuple[Row, Job | None, Feed]]:
        """Who leaves, who joins, and which rows go through the model now."""
        self._sweep(now)
        self._join()
        with self._lock:
            turn = self._line.turn(now)
        batch: list[tuple[Row, Job | None, Feed]] = []
        left = CHUNK
        seen: set[int] = set()
        for job in sorted(self._running, key=lambda j: (j.ticket.kind, j.ticket.number)):
            if job.ticket.kind not in turn:
                continue
            if batch and job.ticket.kind is Kind.DOCUMENT:
                left = min(left, CHUNK // 4)  # a starved document beside routes: a bite, not a meal
            try:
                for row in job.rows if job.prefix.row.done else [job.prefix.row]:
                    if not row.done and id(row) not in seen and row.begin(job.room):
                        seen.add(id(row))
                        left -= self._feed(batch, row, job, left)
            except HubError as exc:
                batch = [part for part in batch if part[1] is not job]
                self._fail(job, exc)
        if not batch and not self._running:
            self._read_ahead(batch)
        return batch

    def _feed(self, batch: list[tuple[Row, Job | None, Feed]], row: Row, job: Job | None, left: int) -> int:
        """Put what fits of `row` into the batch. Short rows always fit: they are what others wait for."""
        count = len(row.feed)
        if count > SHORT:
            count = min(count, left)
            if count <= 0:
                return 0
        assert row.node is not None
        ends = count == len(row.feed)
        batch.append((row, job, Feed(row.node, row.feed[:count], wants=ends and row.settle is not None)))
        return count if count > SHORT else 0

    def _run(self, batch: Sequence[tuple[Row, Job | None, Feed]]) -> Tensor:
        return self.forward.run([feed for _, _, feed in batch])

    def _settle(self, batch: Sequence[tuple[Row, Job | None, Feed]], logits: Tensor, seconds: float) -> None:
        """Hand every row its logits; go on with the stories whose requests are all answered."""
        total = sum(len(feed.tokens) for _, _, feed in batch)
        self._count(batch, total, seconds)
        answers = iter(logits)
        failed: dict[int, tuple[Job, Exception]] = {}
        touched: dict[int, Job] = {}
        for row, job, feed in batch:
            row.feed = row.feed[len(feed.tokens) :]
            scores = next(answers) if feed.wants else None
            if job is not None:
                job.used_s += seconds * len(feed.tokens) / total
                touched[job.ticket.number] = job
            if row.feed:
                continue
            if scores is not None and row.settle is not None:
                try:
                    row.feed = row.settle(scores)
                except Exception as exc:  # one job's trouble is not the others'
                    assert job is not None
                    failed[job.ticket.number] = job, exc
            if not row.feed and job is not None:
                row.end(job.room)
            elif not row.feed:
                row.end(self._space)
                self.counts.prefix_ahead += 1
        for number, (loser, error) in failed.items():
            del touched[number]
            self._fail(loser, error)
        for job in touched.values():
            if job.prefix.row.done and all(row.done for row in job.rows):
                self._go_on(job)

    # ── jobs come and go ────────────────────────────────────────────────────────────────────────────────────────────────

    def _sweep(self, now: float) -> None:
        with self._lock:
            late = [self._jobs[t.number] for t in self._line.late(now) if t.number in self._jobs]
            canceled = [job for job in self._jobs.values() if job.canceled]
        for job in canceled:
            self.counts.canceled += 1
            self._end(job, None, Unavailable("model_unavailable", "the request was canceled"))
        for job in late:
            if not job.canceled:
                self.counts.late += 1
                self._end(job, None, HubError("deadline_passed", "the deadline passed before the model had an answer"))

    def _join(self) -> None:
        while True:
            with self._lock:
                ticket = self._line.start(self._fits)
                job = self._jobs.get(ticket.number) if ticket is not None else None
            if job is None:
                return
            self._running.append(job)
            # The prefix may still have to be read: the job's line hangs behind what it will be.
            line = Node(job.first, units(job.task.line), job.prefix.node, len(job.prefix.tokens))
            job.story = job.task.story(Branch(line))
            self._go_on(job, first=True)

    def _fits(self, ticket: Ticket) -> bool:
        """Give the job its room and its prefix, if there is space for both. It never needs more later on."""
        job = self._jobs.get(ticket.number)
        if job is None:
            return False
        task = job.task
        tokens = tuple(task.prefix)
        prefix = self._prefixes.get(tokens)
        if prefix is not None:
            prefix.users += 1  # before anything is evicted
        else:
            first = self._take(len(tokens))
            if first is None:
                return False
            prefix = _Prefix(tokens, Node(first, units(len(tokens))))
            prefix.users = 1
            self._prefixes[tokens] = prefix
        line = units(task.line)
        for beside in (units(task.beside), units(task.widest)):
            place = self._take(line + beside)
            if place is not None:
                break
        else:
            prefix.users -= 1
            if not prefix.row.done and not prefix.users:
                self._drop(prefix)
            return False
        if prefix.row.done:
            self.counts.prefix_hits += 1
            self.counts.reused_tokens += len(tokens)
        else:
            self.counts.prefix_misses += 1
        self._prefixes.move_to_end(tokens)
        self._ahead.pop(tokens, None)
        job.prefix, job.first, job.size = prefix, place, line + beside
        job.room = Space(place + line, beside)
        return True

    def _take(self, tokens: int) -> int | None:
        """Space in the memory, at the cost of prefixes that nobody uses now."""
        while (first := self._space.take(tokens)) is None:
            idle = next((p for p in self._prefixes.values() if not p.users), None)
            if idle is None:
                return None
            self._drop(idle)
            self.counts.prefix_evicted += 1
        return first

    def _drop(self, prefix: _Prefix) -> None:
        del self._prefixes[prefix.tokens]
        self._space.give(prefix.node.first, len(prefix.tokens))

    def _read_ahead(self, batch: list[tuple[Row, Job | None, Feed]]) -> None:
        """Idle: one chunk of a prefix that will probably be wanted."""
        unfinished = self._unfinished()
        while unfinished is None:
            with self._lock:
                if not self._ahead:
                    return
                tokens, _ = self._ahead.popitem()
            if tokens in self._prefixes:
                self._prefixes.move_to_end(tokens)
                continue
            # At most half of the memory is kept for later.
            first = self._take(len(tokens)) if self._space.free - units(len(tokens)) > self.memory.tokens // 2 else None
            if first is None:
                continue
            unfinished = self._prefixes[tokens] = _Prefix(tokens, Node(first, units(len(tokens))))
        self._feed(batch, unfinished.row, None, CHUNK)

    def _unfinished(self) -> _Prefix | None:
        return next((p for p in self._prefixes.values() if not p.row.done), None)

    def _go_on(self, job: Job, first: bool = False) -> None:
        """Hand the story its answers until it asks for something that needs a step."""
        try:
            while True:
                if not job.requests:
                    job.requests = next(job.story) if first else job.story.send([answer() for answer in job.answers])
                    first = False
                    # A long stretch is read once, by its own branch, before anything forks from it.
                    long = {id(r.branch): r.branch for r in job.requests if len(r.branch.pending) > SHORT}
                    job.rows, job.answers = [reading(branch) for branch in long.values()], []
                    if job.rows:
                        return
                requests, job.requests = job.requests, []
                job.rows = []
                for request in requests:
                    self._begin(job, request)
                if job.rows:
                    return
        except StopIteration as end:
            self.counts.finished += 1
            self._end(job, end.value, None)
        except Exception as exc:  # a story's own mistake ends that story
            self._fail(job, exc)

    def _fail(self, job: Job, error: Exception) -> None:
        self.counts.failed += 1
        if not isinstance(error, HubError):
            log.error("a job of the model failed", exc_info=error)
            error = Unavailable("model_unavailable", "the model failed at this request")
        self._end(job, None, error)

    def _end(self, job: Job, result: Any, error: BaseException | None) -> None:
        """The job leaves: its room is free again, whatever it was doing."""
        self._litter = True
        if job in self._running:
            self._running.remove(job)
            job.story.close()
            job.prefix.users -= 1
            self._space.give(job.first, job.size)
        with self._lock:
            self._line.leave(job.ticket, job.used_s, finished=error is None)
            known = self._jobs.pop(job.ticket.number, None)
        if known is not None:
            job.finish(result, error)

    # ── requests ────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin(self, job: Job, request: Request) -> None:
        job.drawn += 1
        assert not isinstance(request, Write) or request.lead or request.branch.pending, "a text needs something before it"
        draw = Draw(self.temperature, f"{self.seed} {job.drawn}", job.task.prefix)
        if isinstance(request, Write):
            writing = Writing(self.words, request, draw)
            job.rows.append(Row(request.lead, parent=request.branch, more=request.limit, settle=writing.settle))
            job.answers.append(lambda: self._written(writing))
        elif isinstance(request, Choose):
            choosing = Choosing(request, draw)
            job.rows += choosing.rows()
            job.answers.append(choosing.answer)
        else:
            if request.branch.pending:
                job.rows.append(reading(request.branch))
            job.answers.append(lambda: None)

    def _written(self, writing: Writing) -> Text:
        self.counts.forced_tokens += writing.forced
        return writing.answer()

    def _count(self, batch: Sequence[tuple[Row, Job | None, Feed]], total: int, seconds: float) -> None:
        c = self.counts
        c.steps += 1
        if any(len(feed.tokens) > SHORT for _, _, feed in batch):
            self._litter = True
            c.read_tokens += total
            c.read_s += seconds
        else:
            c.written_tokens += len(batch)
            c.written_s += seconds
