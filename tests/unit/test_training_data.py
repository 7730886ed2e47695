"""What the encoder learns from: enough of it, whole, and nothing of it in the evaluation sets."""

from __future__ import annotations

import json
import random
import re
import sys
from pathlib import Path

import pytest

from hubpeer import evaluate
from hubpeer.evaluate import DocRow, RouteRow

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # `training` is no part of the package

from training.data import (  # noqa: E402
    DATA,
    DEFAULT_FOUR,
    GLUE,
    LEVELS,
    RULES,
    SHARED_WITH_EVALS,
    TWINS,
    VARIANTS,
    Composer,
    Piece,
    damaged,
    documents,
    functions,
    glued,
    joins,
    questions,
    split,
    split_questions,
    with_questions,
)

SEED = 4
ROUTES = evaluate.read_rows(ROOT / "evals" / "routes.jsonl", RouteRow)


def plain(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def sentences(text: str) -> set[str]:
    """Whole texts, and their sentences of five words or more."""
    parts = [text, *re.split(r"(?<=[.?!;])\s+|\n", text)]
    return {p for part in parts if len((p := plain(part)).split()) >= 5}


def test_there_are_enough_functions():
    found = functions()
    assert len(found) >= 400
    assert sum(len(f.phrasings) >= 10 for f in found.values()) >= 400
    assert all(len(f.phrasings) >= 7 and f.capabilities and f.specialties for f in found.values())
    assert {name for group in TWINS for name in group} <= {*found, *SHARED_WITH_EVALS}


def test_training_and_evaluation_share_no_function():
    """No capability's name occurs on both sides; the default four's own cards are the one exception, and it is reported."""
    evaluated = {
        name for row in ROUTES if row.set_name != "default" for card in row.registry.values() for name in card.capabilities
    }
    trained = {name: set(f.capabilities) for name, f in functions().items()}
    assert {name: words & evaluated for name, words in trained.items() if words & evaluated} == {}


def test_training_and_evaluation_share_no_sentence():
    evaluated = {s for row in ROUTES for s in sentences(row.query)}
    for row in evaluate.read_rows(ROOT / "evals" / "documents.jsonl", DocRow):
        evaluated |= sentences(row.text)
    trained = {s for f in functions().values() for text in [*f.phrasings, *f.decoys] for s in sentences(text)}
    trained |= {s for text in joins()["small_talk"] for s in sentences(text)}
    for name in ("documents", "questions"):
        lines = (DATA / f"{name}.jsonl").read_text("utf-8").splitlines()
        trained |= {s for line in lines for s in sentences(json.loads(line)["text"])}
    assert len(trained) > 5000
    assert trained & evaluated == set()


def test_held_functions_never_occur_in_training():
    trained, held = split(SEED)
    assert len(held) >= 40
    assert {f.id for f in trained} & {f.id for f in held} == set()
    assert set(DEFAULT_FOUR) <= {f.id for f in trained}
    for group in TWINS:
        sides = {name in {f.id for f in held} for name in group if name in functions()}
        assert len(sides) <= 1, group
    said = {plain(p) for f in trained for p in f.phrasings}
    assert {plain(p) for f in held for p in f.phrasings} & said == set()
    assert [f.id for f in split(SEED)[1]] == [f.id for f in held]


@pytest.mark.parametrize("held", [False, True])
def test_composed_questions_are_whole(held):
    print(f"seed {SEED}")
    composer = Composer(split(SEED)[held], random.Random(SEED), held=held)
    kinds = set()
    for _ in range(300):
        one = composer.ask()
        assert "".join(one.text[span.start : span.end] for span in one.spans) == one.text
        assert 3 <= len(one.cards) <= 8
        assert one.agents <= set(one.cards)
        assert {agent for edge in one.edges for agent in edge} <= one.agents
        assert one.rule == next((span.tag for span in one.spans if span.tag in RULES), None)
        assert all(span.tag in LEVELS for span in one.spans if span.agent)
        assert "{" not in one.text
        kinds.add((len(one.agents), len(one.edges)))
    assert {(0, 0), (1, 0), (2, 0), (2, 1), (3, 2)} <= kinds


def test_whole_questions_become_questions_among_cards():
    composer = Composer(functions().values(), random.Random(SEED), held=False)
    for written in questions():
        one = composer.natural(written)
        assert "".join(one.text[span.start : span.end] for span in one.spans) == one.text == written.text
        assert len(one.agents) == len({function for _, _, function in written.clauses if function})
        assert {one.registry[name].id for name in one.cards} >= {name for _, _, name in written.clauses if name}
        assert {agent for edge in one.edges for agent in edge} <= one.agents <= set(one.cards)
        assert one.natural
        assert one.foreign is (not one.agents)


def test_whole_questions_are_held_with_their_functions():
    held = split(SEED)[1]
    away = {f.id for f in held}
    trained, kept = split_questions(held, SEED)
    assert {one.text for one in trained} & {one.text for one in kept} == set()
    assert len(trained) + len(kept) == len(questions())
    assert not any(one.mentions & away for one in trained)
    said = {text for f in with_questions(split(SEED)[0], trained) for text in f.said}
    assert said <= {text for one in trained for text, _, _ in one.clauses}
    assert len(said) > 400


def test_what_joins_clauses_goes_to_the_one_behind():
    pieces = [
        Piece("once ", GLUE),
        Piece("a", "first", "x"),
        Piece(", and then ", GLUE),
        Piece("b", "second", "y"),
        Piece(" ok", GLUE),
    ]
    assert [(piece.words, piece.tag) for piece in glued(pieces)] == [("once a, ", "first"), ("and then b ok", "second")]


def test_a_function_has_few_cards_and_they_stay():
    function = next(iter(functions().values()))
    cards = {function.card(random.Random(n)).capabilities[0] for n in range(40)}
    assert cards <= {function.variant(n).capabilities[0] for n in range(VARIANTS)}
    assert function.variant(1) == function.variant(1)


def test_doubles_are_never_in_one_registry():
    composer = Composer(functions().values(), random.Random(SEED), held=False)
    for _ in range(300):
        names = {function.id for function in composer.registry().values()}
        assert all(len(names & set(group)) <= 1 for group in TWINS), names


def test_damage_leaves_a_document_readable():
    print(f"seed {SEED}")
    texts = [one.text for one in documents()[0][:200]]
    rng = random.Random(SEED)
    found = [damaged(text, rng) for text in texts]
    assert [damaged(text, random.Random(SEED)) for text in texts[:1]] == found[:1]
    assert sum(a != b for a, b in zip(texts, found, strict=True)) > 100
    assert all(0.6 * len(text) < len(worn) < 1.4 * len(text) + 40 for text, worn in zip(texts, found, strict=True))


def test_a_held_company_is_held_whole():
    trained, held = split(SEED)
    away = {f.trade for f in held if f.companies}
    assert len(away) >= 5
    assert away & {f.trade for f in trained if f.companies} == set()


def test_a_seed_gives_the_same_questions():
    first, second = (
        [composer.ask().text for _ in range(20)]
        for composer in (Composer(functions().values(), random.Random(7), held=False) for _ in range(2))
    )
    assert first == second
