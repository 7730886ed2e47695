"""Documents: one reading, all answers from the taxonomy, nothing cut in silence."""

from __future__ import annotations

import random

import msgspec
import pytest

from hubpeer import taxonomy
from hubpeer.jobs import Kind
from hubpeer.model import DocAsk
from hubpeer.model.categorizer import Categorizer, excerpt
from hubpeer.model.forward import Node
from hubpeer.model.requests import Branch, Choice, Choose, Text, Write
from hubpeer.wire import Categorization

from .conftest import Given, hostile, is_clean, run

MARK = "\n[... {characters} characters left out ...]\n"


@pytest.fixture(scope="module")
def categorizer(words, layout) -> Categorizer:
    return Categorizer(words, layout, 4096)


def record_of(engine, categorizer: Categorizer, ask: DocAsk) -> Categorization:
    given = Given(engine, categorizer.task(ask), Kind.DOCUMENT, ask.client)
    run(engine, given)
    assert given.error is None, given.error
    assert isinstance(given.result, Categorization)
    return given.result


def an_ask(text: str, **more) -> DocAsk:
    return DocAsk("acme", text, taxonomy.DEFAULT, ["finance", "sales", "marketing", "ceo"], **more)


def test_a_record_names_only_what_exists(make_engine, categorizer: Categorizer) -> None:
    engine = make_engine(temperature=1.0)
    for seed in range(12):
        rng = random.Random(seed)
        ask = an_ask(hostile(rng, 60), title=hostile(rng, 3), filename=hostile(rng, 3), headings=[hostile(rng, 2)])
        record = record_of(engine, categorizer, ask)
        assert record.category in taxonomy.DEFAULT
        assert set(record.relevant_agents) <= set(ask.agents)
        assert record.method == "llm_intelligent"
        assert 0 < record.confidence <= 1
        assert record.read_chars == record.total_chars == len(ask.text)
        assert record.category not in {a["category"] for a in record.alternatives}
    assert is_clean(engine)


def test_short_texts_are_written_side_by_side_and_joined(words, layout) -> None:
    """The story, told by hand: which texts it asks for at once, and what it makes of them."""
    assert len(layout.document.summary) == len(layout.document.entities) == 2  # as shipped
    texts = msgspec.structs.replace(layout.document, summary=["It is:", "It says:", "So:"], entities=["Who:", "What:"])
    story = (
        Categorizer(words, msgspec.structs.replace(layout, document=texts), 4096)
        .task(an_ask("a text"))
        .story(Branch(Node(0, 16)))
    )
    [first] = next(story)
    assert isinstance(first, Choose)
    requests = story.send([Choice(0, [1.0] + [0.0] * (len(first.options) - 1))])
    assert [words.text(r.lead) for r in requests if isinstance(r, Write)] == ["It is:", "It says:", "So:", "Who:", "What:"]
    said = iter([" A bill.", " Pay  it.", " A bill.", " Kolm; Ada", " 5 euros; Ada"])
    answers = [
        Text(words.data(next(said)), complete=True) if isinstance(r, Write) else Choice(0, [1.0] + [0.0] * (len(r.options) - 1))
        for r in requests
    ]
    with pytest.raises(StopIteration) as end:
        story.send(answers)
    record = end.value.value
    assert (record.summary, record.key_entities) == ("A bill. Pay it.", ["Kolm", "Ada", "5 euros"])


def test_a_long_document_says_how_much_was_read(make_engine, categorizer: Categorizer) -> None:
    engine = make_engine()
    text = "\n".join(f"Line {i} of the report." for i in range(20_000))
    record = record_of(engine, categorizer, an_ask(text))
    assert record.total_chars == len(text)
    assert 2000 < record.read_chars < 20_000
    assert is_clean(engine)


def test_no_document_asks_for_more_than_its_share(categorizer: Categorizer) -> None:
    for text in ("", "a", "漢" * 50_000, "x" * 300_000, "\n" * 9000, "🙂" * 3000):
        task = categorizer.task(an_ask(text, headings=["h" * 80] * 64))
        assert len(task.prefix) + task.line + task.beside <= 4096 + 64


@pytest.mark.parametrize("seed", range(20))
def test_an_excerpt_is_of_the_text_and_marks_its_gaps(seed: int) -> None:
    rng = random.Random(seed)
    lines = [f"{i:06d} " + "word " * rng.randint(0, 12) for i in range(rng.randint(1, 3000))]
    text = "\n".join(lines)
    headings = [line[:6] for line in rng.sample(lines, min(len(lines), rng.randint(0, 10)))]
    budget = rng.randint(400, 9000)
    got, read = excerpt(text, headings, budget, MARK)
    if len(text) <= budget:
        assert (got, read) == (text, len(text))
        return
    assert read <= budget
    assert text.startswith(got[:50])
    assert text.endswith(got[-50:])
    left_out = [int(part.split(" characters left out ...]\n")[0].replace(",", "")) for part in got.split("\n[... ")[1:]]
    assert read + sum(left_out) == len(text), "what is read and what is left out is the whole"


def test_headings_lead_to_the_middle() -> None:
    text = "start " * 2000 + "\n## The price\nIt costs 7 million.\n" + "filler " * 3000
    got, _ = excerpt(text, ["The price"], 3000, MARK)
    assert "It costs 7 million." in got
