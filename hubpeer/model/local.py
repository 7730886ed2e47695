"""The model in this process: the asyncio side of the engine, its thread, its watchdog."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from hubpeer import settings as config
from hubpeer.errors import HubError, SettingsError, Unavailable
from hubpeer.jobs import Kind, Limits
from hubpeer.model import DocAsk, PlanAsk, PlanDraft
from hubpeer.model.categorizer import Categorizer
from hubpeer.model.engine import Engine, Job
from hubpeer.model.folder import find
from hubpeer.model.load import Weights, few_kernels, keep_pages, load_weights, read_shape, trim
from hubpeer.model.planner import Planner
from hubpeer.model.prompt import Words, read_layout
from hubpeer.model.requests import Task
from hubpeer.wire import Categorization

log = logging.getLogger("hubpeer.model")


class LocalModel:
    """See `hubpeer.model.Model`. Made by `open`."""

    def __init__(self, settings: config.Model, folder: Path) -> None:
        self.name = settings.name
        self._settings, self._folder = settings, folder
        self._cache = Path(settings.cache).expanduser() if settings.cache else None
        if settings.threads:
            torch.set_num_threads(settings.threads)
        few_kernels()
        keep_pages()
        began = time.monotonic()
        shape = read_shape(folder)
        self._words = Words(folder, shape)
        layout = read_layout(settings.layout, self._words)
        per_token = shape.kv_bytes_per_token * (2 if settings.dtype == "fp32" else 1)
        # More than four contexts are never of use; a tiny model would otherwise get a million tokens.
        self._tokens = min(settings.kv_memory // per_token, 4 * settings.max_context)
        context = min(settings.max_context, shape.context)
        if self._tokens < 1024:
            raise SettingsError(
                f"model.kv_memory = {settings.kv_memory} holds {self._tokens} tokens of this model; it needs 1024 at least, "
                f"that is {1024 * per_token}"
            )
        self._planner = Planner(self._words, layout, min(context, self._tokens))
        self._categorizer = Categorizer(self._words, layout, min(context, self._tokens // 2))
        trim()  # of what reading the tokenizer took
        self._weights: Weights | None = load_weights(folder, settings.dtype, self._cache)
        self.revision = f"{self._weights.tensors.content.hexdigest()[:12]}-{settings.dtype}"
        self._load_s = time.monotonic() - began
        self._reloads = self._hangs = 0
        self._closed = threading.Event()
        self._lock = threading.Lock()
        self._engine, self._thread = self._start(self._weights)
        trim()

    @classmethod
    def open(cls, settings: config.Model) -> LocalModel:
        """Blocks while the model loads. Raises `SettingsError` or `Unavailable`."""
        return cls(settings, find(settings.name))

    # ── asks ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    async def plan(self, ask: PlanAsk, deadline: float) -> PlanDraft:
        if not ask.cards:
            return PlanDraft([])
        result = await self._do(await asyncio.to_thread(self._planner.task, ask), Kind.ROUTE, ask.asker, deadline)
        assert isinstance(result, PlanDraft)
        return result

    async def categorize(self, ask: DocAsk, deadline: float | None) -> Categorization:
        result = await self._do(await asyncio.to_thread(self._categorizer.task, ask), Kind.DOCUMENT, ask.client, deadline)
        assert isinstance(result, Categorization)
        return result

    def expect(self, asks: Sequence[PlanAsk]) -> None:
        self._engine.expect([self._planner.prefix(ask) for ask in asks if ask.cards])

    async def _do(self, task: Task, kind: Kind, client: str, deadline: float | None) -> Any:
        loop = asyncio.get_running_loop()
        future: asyncio.Future[Any] = loop.create_future()

        def finish(result: Any, error: BaseException | None) -> None:
            def settle() -> None:
                if not future.done():
                    future.set_exception(error) if error is not None else future.set_result(result)

            # The loop may be gone: a hub that stops does not wait for the model.
            with contextlib.suppress(RuntimeError):
                loop.call_soon_threadsafe(settle)

        self._replace_if_hung()
        job = Job(task, finish)
        engine = self._engine
        engine.submit(job, kind, client, deadline)
        try:
            while not future.done():
                left = None if deadline is None else deadline - time.monotonic()
                patience = self._settings.stuck_s if left is None else max(0.0, min(left, self._settings.stuck_s))
                done, _ = await asyncio.wait([future], timeout=patience)
                if not done:
                    self._replace_if_hung()
                    if deadline is not None and time.monotonic() >= deadline and not future.done():
                        raise HubError("deadline_passed", "the deadline passed before the model had an answer")
            return future.result()
        finally:
            if not future.done():
                future.cancel()
                job.cancel()
                engine.wake()

    # ── life ────────────────────────────────────────────────────────────────────────────────────────────────────────────

    def _start(self, weights: Weights) -> tuple[Engine, threading.Thread]:
        s = self._settings
        engine = Engine(weights, self._words, self._tokens, Limits(waiting=s.queue), s.temperature, s.seed)
        thread = threading.Thread(target=self._serve, args=(engine,), name="hubpeer-model", daemon=True)
        thread.start()
        return engine, thread

    def _serve(self, engine: Engine) -> None:
        """The thread. A step that fails takes its jobs with it, and the model is loaded again."""
        try:
            engine.serve()
            return
        except Exception:
            log.exception("a step of the model failed; loading it again")
        gone = Unavailable("model_unavailable", "the model failed and is being loaded again")
        for job in engine.stop(gone):
            job.finish(None, gone)
        with self._lock:
            if self._closed.is_set() or engine is not self._engine:
                return
            self._reloads += 1
            self._forget()
        del engine
        try:
            weights = load_weights(self._folder, self._settings.dtype, self._cache)
        except Exception:
            log.exception("the model could not be loaded again; it stays away until the hub is started anew")
            return
        with self._lock:
            if self._closed.is_set():
                weights.tensors.close()
                return
            self._weights = weights
            counts = self._engine.counts
            self._engine, self._thread = self._start(weights)
            self._engine.counts = counts

    def _replace_if_hung(self) -> None:
        """A step that never ends cannot be stopped, only left behind: its thread keeps the old memory, the weights (which
        nobody changes) are shared with a new engine."""
        with self._lock:
            engine, weights = self._engine, self._weights
            began = engine.step_began
            if self._closed.is_set() or weights is None or began is None or time.monotonic() - began < self._settings.stuck_s:
                return
            log.error("a step of the model has not ended for %.0f s; starting a new engine", time.monotonic() - began)
            gone = Unavailable("model_unavailable", "the model hung and was started again")
            left = engine.stop(gone)
            self._hangs += 1
            self._reloads += 1
            counts = engine.counts
            self._engine, self._thread = self._start(weights)
            self._engine.counts = counts
        for job in left:
            job.finish(None, gone)

    def _forget(self) -> None:
        """Let go of weights and memory; what still uses them keeps them."""
        if self._weights is not None:
            self._weights.tensors.close()
        self._weights = None
        self._engine.release()
        trim()

    async def close(self) -> None:
        with self._lock:
            if self._closed.is_set():
                return
            self._closed.set()
        gone = Unavailable("model_unavailable", "the model is closed")
        for job in self._engine.stop(gone):
            job.finish(None, gone)
        await asyncio.to_thread(self._thread.join, self._settings.stuck_s)
        if not self._thread.is_alive():
            with self._lock:
                self._forget()

    # ── figures ─────────────────────────────────────────────────────────────────────────────────────────────────────────

    def status(self) -> dict[str, Any]:
        weights = self._weights
        figures = self._engine.figures()
        return {
            "model_name": self.name,
            "revision": self.revision,
            "loaded": weights is not None and not self._engine.stopped,
            "dtype": self._settings.dtype,
            "threads": torch.get_num_threads(),
            "load_s": round(self._load_s, 2),
            "reloads": self._reloads,
            "hangs": self._hangs,
            "memory": {
                "weights_bytes": weights.nbytes if weights is not None else 0,
                "kv_bytes": figures["kv"]["bytes"],
                **process_memory(),
            },
            **figures,
        }


def process_memory() -> dict[str, int]:
    """Resident bytes of this process, now and at most; empty where /proc is missing."""
    try:
        lines = Path(f"/proc/{os.getpid()}/status").read_text("ascii", "replace").splitlines()
    except OSError:
        return {}
    found = {name: int(value.split()[0]) * 1024 for name, _, value in (line.partition(":") for line in lines) if name in NAMES}
    return {NAMES[name]: value for name, value in found.items()}


NAMES = {"VmRSS": "resident_bytes", "VmHWM": "peak_bytes"}
