"""`hubpeer eval`: how well questions are routed and documents are categorized."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final

import click
import msgspec

from hubpeer import evaluate
from hubpeer.cli import show
from hubpeer.cli.commands import Context, cli, command
from hubpeer.errors import HubError, SettingsError
from hubpeer.evaluate import DocGuess, DocRow, RouteGuess, RouteRow
from hubpeer.model import DocAsk, Model, PlanAsk, open_model
from hubpeer.plan import Draft

PATIENCE_S: Final = 600.0
FILE: Final = click.Path(exists=True, dir_okay=False, path_type=Path)


@cli.group("eval")
def evaluation() -> None:
    """Measure a planner or categorizer on rows with known answers; compare two runs."""


def run_options(function: Callable[..., None]) -> Callable[..., None]:
    for option in (
        click.option("--predictions", type=click.Path(dir_okay=False, path_type=Path), help="Write one JSON line per row."),
        click.option(
            "--model", default="builtin", show_default=True, help="builtin, none (the rules), a folder or a hub name."
        ),
        click.argument("file", type=FILE),
    ):
        function = option(function)
    return function


@evaluation.command()
@run_options
@command
async def routes(context: Context, file: Path, model: str, predictions: Path | None) -> None:
    """Route every question of FILE.jsonl and print the figures."""
    rows = evaluate.read_rows(file, RouteRow)
    planner, close = await _planner(context, model)
    try:
        guesses = await asyncio.to_thread(evaluate.predict_routes, rows, planner)
    finally:
        await close()
    _write(predictions, guesses)
    _print(context, evaluate.per_set(evaluate.score_routes, rows, guesses))


@evaluation.command()
@run_options
@command
async def documents(context: Context, file: Path, model: str, predictions: Path | None) -> None:
    """Categorize every document of FILE.jsonl and print the figures."""
    rows = evaluate.read_rows(file, DocRow)
    categorize, close = await _categorizer(context, model)
    try:
        agents = list(context.settings().cards)
        guesses = await asyncio.to_thread(evaluate.predict_documents, rows, categorize, agents)
    finally:
        await close()
    _write(predictions, guesses)
    _print(context, evaluate.per_set(evaluate.score_documents, rows, guesses))


@evaluation.command()
@click.argument("rows", type=FILE)
@click.argument("a", type=FILE)
@click.argument("b", type=FILE)
@command
async def compare(context: Context, rows: Path, a: Path, b: Path) -> None:
    """Compare the predictions A and B on the questions or documents of ROWS, row by row."""
    _print(context, evaluate.compare(_right(rows, a), _right(rows, b)))


def _right(rows: Path, predictions: Path) -> dict[str, bool]:
    """Which rows a file of predictions gets right."""
    try:
        gold = evaluate.read_rows(rows, RouteRow)
    except SettingsError:  # not questions, so documents
        said = {guess.id: guess.category for guess in evaluate.read_rows(predictions, DocGuess)}
        return {row.id: row.category == said[row.id] for row in evaluate.read_rows(rows, DocRow) if row.id in said}
    plans = {guess.id: guess for guess in evaluate.read_rows(predictions, RouteGuess)}
    return {row.id: evaluate.exactly(row, plans[row.id]) for row in gold if row.id in plans}


# ── what answers ────────────────────────────────────────────────────────────────────────────────────────────────────────


async def _nothing() -> None:
    """Nothing to close."""


async def _planner(context: Context, name: str) -> tuple[evaluate.Planner, Callable[[], Any]]:
    if name == "none":
        return evaluate.by_keywords, _nothing
    if name == "builtin":
        from hubpeer.encoder import BuiltIn

        encoder = BuiltIn.open()
        return lambda ask: evaluate.by_encoder(encoder.plan(ask)), _nothing
    model = await _open(context, name)
    loop = asyncio.get_running_loop()

    def ask_model(ask: PlanAsk) -> tuple[Draft | None, str, list[str], float | None]:
        try:
            call = asyncio.run_coroutine_threadsafe(model.plan(ask, time.monotonic() + PATIENCE_S), loop)
            draft = call.result()
        except HubError as exc:
            return None, exc.code, [], None
        return draft if draft.agents else None, "llm_intelligent", [a.agent for a in draft.alternatives], draft.confidence

    return ask_model, model.close


async def _categorizer(context: Context, name: str) -> tuple[Callable[[DocAsk], Any], Callable[[], Any]]:
    if name == "none":
        return evaluate.by_rules, _nothing
    if name == "builtin":
        from hubpeer.encoder import BuiltIn

        return BuiltIn.open().categorize, _nothing
    model = await _open(context, name)
    loop = asyncio.get_running_loop()
    return lambda ask: asyncio.run_coroutine_threadsafe(model.categorize(ask, None), loop).result(), model.close


async def _open(context: Context, name: str) -> Model:
    own = msgspec.structs.replace(context.settings().model, name=name)
    model = await open_model(own)
    if model is None:
        raise SettingsError(f"no model is called {name!r}")
    return model


# ── what is printed ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _write(path: Path | None, guesses: list[Any]) -> None:
    if path is not None:
        path.write_bytes(b"".join(msgspec.json.encode(guess) + b"\n" for guess in guesses))


def _print(context: Context, figures: dict[str, Any]) -> None:
    if context.json:
        show.emit(figures)
        return
    for name, group in figures.items():
        if name == "sets":
            for set_name, one in group.items():
                score = one.get("exact_set", one.get("top1"))
                show.console.print(f"{set_name:14} {_shown(score)}", markup=False)
        elif isinstance(group, dict):
            show.console.print(f"[bold]{name}[/]", markup=True)
            show.pairs({f"  {key.replace('_', ' ')}": _shown(value) for key, value in group.items()})
        else:
            show.console.print(f"{name.replace('_', ' ')}: {_shown(group)}", markup=False)


def _shown(value: Any) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return ", ".join(f"{key} {_shown(one)}" for key, one in value.items())
    if isinstance(value, list):
        return " to ".join(map(_shown, value))
    return str(value)
