"""The loop: many jobs at once give what each gives alone, whoever comes, goes, is late or breaks."""

from __future__ import annotations

import gc
import itertools
import random
from collections.abc import Callable

import llguidance
import msgspec
import pytest
import torch

from hubpeer.errors import Busy, HubError, Unavailable
from hubpeer.jobs import Kind, Limits
from hubpeer.model import engine as engines
from hubpeer.model.engine import Engine
from hubpeer.model.forward import Feed, Forward, Memory, Node
from hubpeer.model.grammar import Line, line_grammar, options_trie
from hubpeer.model.load import Weights
from hubpeer.model.planner import Planner
from hubpeer.model.prompt import Words
from hubpeer.model.requests import Branch, Choice, Choose, Choosing, Read, Space, Story, Task, Text, Write, Writing

from .conftest import Given, an_ask, hostile, is_clean, plan_of, rounded, run

Make = Callable[..., Engine]


def writing(words: Words, text: str, grammar: str, limit: int = 20, copies: int = 1) -> Task:
    tokens = words.data(text)

    def story(branch: Branch) -> Story:
        branch.add(tokens)
        return (yield [Write(branch, words.data(f" {i}:"), grammar, limit) for i in range(copies)])

    return Task(words.data("the budget"), len(tokens) + 16, 64 * copies, 64, story)


def choosing(words: Words, text: str, options: list[str], ends: str = "\n") -> Task:
    tokens = words.data(text)

    def story(branch: Branch) -> Story:
        branch.add(tokens)
        return (yield [Choose(branch, [words.data(o) for o in options], ends=words.data(ends))])[0]

    return Task(words.data("the budget"), len(tokens) + 16, 64 * len(options), 64, story)


def alone(engine: Engine, task: Task) -> object:
    given = Given(engine, task)
    run(engine, given)
    assert given.error is None, given.error
    return given.result


# ── the same, however it is run ─────────────────────────────────────────────────────────────────────────────────────────


def one_by_one(weights: Weights, words: Words, prompt: list[int], grammar: str, limit: int) -> list[int]:
    """The plainest decoder there is: one token a pass, forced ones too, nothing shared or kept from others."""
    forward = Forward(weights, Memory(weights, 2048))
    node = Node(0, 2048)
    line = Line(words, grammar)
    written: list[int] = []
    due: list[int] = []
    with torch.inference_mode():
        for token in prompt:
            logits = forward.run([Feed(node, [token], True)])
        while len(written) < limit:
            if not due:
                due = line.take(int(logits[0].masked_fill(line.mask(), float("-inf")).argmax()))
                if not due:
                    break
            token = due.pop(0)
            written.append(token)
            logits = forward.run([Feed(node, [token], True)])
            if not due and line.ended:
                break
    return written


GRAMMARS = {
    "free": line_grammar(),
    "forced": llguidance.LLMatcher.grammar_from_regex(
        r" the (budget|campaign|deal) of quarter [0-9]{2} is (approved|refused)\."
    ),
    "json": llguidance.LLMatcher.grammar_from_json_schema(
        {
            "type": "object",
            "properties": {"agent": {"enum": ["finance", "sales"]}, "priority": {"enum": [1, 2, 3]}},
            "required": ["agent", "priority"],
            "additionalProperties": False,
        },
        overrides={"whitespace_flexible": False},
    ),
}


@pytest.mark.parametrize("name", GRAMMARS)
def test_together_is_the_same_as_one_by_one(make_engine: Make, weights: Weights, words: Words, name: str) -> None:
    engine = make_engine()
    prompts = ["question one", "another question, much longer: " + "budget and revenue " * 30, "x"]
    given = [Given(engine, writing(words, prompt, GRAMMARS[name], copies=3)) for prompt in prompts]
    run(engine, *given)
    for prompt, job in zip(prompts, given, strict=True):
        for i, text in enumerate(job.result):
            start = words.data("the budget") + words.data(prompt) + words.data(f" {i}:")
            assert text.tokens == one_by_one(weights, words, start, GRAMMARS[name], 20)
    if name == "forced":
        assert engine.counts.forced_tokens > engine.counts.written_tokens, "most of it never was a question to the model"


def test_plans_are_the_same_alone_in_company_and_from_the_cache(make_engine: Make, terse: Planner) -> None:
    rng = random.Random(5)
    asks = [an_ask(hostile(rng), asker=rng.choice(["ceo", "sales", "finance"])) for _ in range(6)]
    apart = [rounded(plan_of(make_engine(), terse, ask)) for ask in asks]
    engine = make_engine()
    given = [Given(engine, terse.task(ask), client=ask.asker) for ask in asks]
    run(engine, *given)
    assert [rounded(g.result) for g in given] == apart
    assert [rounded(plan_of(engine, terse, ask)) for ask in asks] == apart
    assert engine.counts.prefix_misses <= 6
    assert engine.counts.prefix_hits >= 6
    assert is_clean(engine)


def test_little_memory_changes_the_time_and_not_the_plan(make_engine: Make, planner: Planner) -> None:
    ask = an_ask()
    roomy, tight = make_engine(8192), make_engine(1168)
    assert rounded(plan_of(tight, planner, ask)) == rounded(plan_of(roomy, planner, ask))
    assert tight.counts.steps > roomy.counts.steps, "the texts were written one after the other"
    other = an_ask(asker="sales")
    assert rounded(plan_of(tight, planner, other)) == rounded(plan_of(roomy, planner, other))
    assert tight.counts.prefix_evicted == 1
    assert is_clean(tight)


def test_a_seed_repeats_itself(make_engine: Make, planner: Planner) -> None:
    warm = [make_engine(temperature=1.0, seed=seed) for seed in (1, 1, 2)]
    first, again, other = (plan_of(engine, planner, an_ask()) for engine in warm)
    assert first == again
    assert first != other


# ── choices ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_choice_spreads_all_of_its_probability(make_engine: Make, words: Words) -> None:
    options = [" sales", " sales-eu", " sales-us", " finance", " x9", " x", "\n"]
    choice = alone(make_engine(), choosing(words, "who?", options, ends=","))
    assert isinstance(choice, Choice)
    assert sum(choice.probabilities) == pytest.approx(1)
    assert all(p > 0 for p in choice.probabilities)


def test_a_choice_is_what_the_logits_say(make_engine: Make, weights: Weights, words: Words) -> None:
    options = [" sales", " sales-eu", " finance"]
    choice = alone(make_engine(), choosing(words, "who?", options, ends=","))
    assert isinstance(choice, Choice)
    start = words.data("the budget") + words.data("who?")
    root = options_trie([words.data(o) for o in options])

    def mass(node, so_far):
        if not node.children:
            return {node.option: 1.0}
        with torch.inference_mode():
            logits = Forward(weights, Memory(weights, 256)).run([Feed(Node(0, 128), [*start, *node.path], True)])[0]
        tokens = list(node.children) + (words.data(",") if node.option is not None else [])
        shares = logits[tokens].softmax(0).tolist()
        found = {node.option: shares[-1]} if node.option is not None else {}
        for child, share in zip(node.children.values(), shares, strict=False):
            found |= {option: share * p for option, p in mass(child, so_far).items()}
        return found

    expected = mass(root, 1.0)
    assert choice.probabilities == pytest.approx([expected[i] for i in range(3)], abs=1e-5)


def test_a_single_option_costs_nothing(make_engine: Make, words: Words) -> None:
    engine = make_engine()
    choice = alone(engine, choosing(words, "who?", [" finance"]))
    assert choice == Choice(0, [1.0])
    assert engine.counts.steps <= 1, "the prefix was read, and nothing else"


# ── cancel, deadline, breakage ──────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("how", ["cancel", "deadline"])
def test_leaving_at_every_step_leaves_nothing_behind(make_engine: Make, terse: Planner, how: str) -> None:
    now = 0.0
    engine = make_engine(clock=lambda: now)
    ask = an_ask("First question to be dropped?")
    expected = plan_of(engine, terse, an_ask("Second?"))
    steps = run(engine, Given(engine, terse.task(ask)))
    assert steps > 5
    for k in range(steps):
        engine._prefixes.clear()
        engine._space = Space(0, engine.memory.tokens)
        first = Given(engine, terse.task(ask), deadline=now + 100)
        second = Given(engine, terse.task(an_ask("Second?")))
        for _ in range(k):
            engine.step()
        assert not first.over or k >= steps - 1
        if how == "cancel":
            first.job.cancel()
        else:
            now += 200
        engine.step()
        assert first.over
        if first.error is not None:
            assert isinstance(first.error, HubError)
            assert first.error.code == ("model_unavailable" if how == "cancel" else "deadline_passed")
        run(engine, second)
        assert rounded(second.result) == rounded(expected)
        assert is_clean(engine)


def test_figures_that_are_no_numbers_end_one_job_and_no_other(make_engine: Make, terse: Planner) -> None:
    engine = make_engine()
    expected = plan_of(engine, terse, an_ask("Good question?"))
    bad = Given(engine, terse.task(an_ask("Bad question?")))
    good = Given(engine, terse.task(an_ask("Good question?")))
    run_forward = engine.forward.run
    poisoned = 0

    def poison(feeds):
        nonlocal poisoned
        logits = run_forward(feeds)
        rows = [
            i for i, feed in enumerate([f for f in feeds if f.wants]) if feed.node.parent is not None and _under(feed.node, bad)
        ]
        if rows and engine.counts.steps > 12:
            logits[rows[0]] = float("nan")
            poisoned += 1
        return logits

    engine.forward.run = poison
    run(engine, bad, good)
    assert poisoned == 1
    assert isinstance(bad.error, Unavailable)
    assert rounded(good.result) == rounded(expected)
    assert is_clean(engine)


def _under(node: Node, given: Given) -> bool:
    return given.job.first <= node.first < given.job.first + given.job.size


def test_a_grammar_that_cannot_be_is_a_coded_error(make_engine: Make, words: Words) -> None:
    engine = make_engine()
    given = Given(engine, writing(words, "x", "this is no grammar"))
    run(engine, given)
    assert isinstance(given.error, Unavailable)
    assert is_clean(engine)


def test_a_story_that_breaks_is_a_coded_error_and_told_to_nobody(make_engine: Make, words: Words, caplog) -> None:
    def story(branch: Branch) -> Story:
        branch.add(words.data("x"))
        yield [Read(branch)]
        raise KeyError("secret")

    engine = make_engine()
    given = Given(engine, Task(words.data("the"), 32, 32, 32, story))
    run(engine, given)
    assert isinstance(given.error, Unavailable)
    assert "secret" not in str(given.error)
    assert "secret" in caplog.text
    assert is_clean(engine)


def test_a_branch_too_large_for_its_room_ends_its_job(make_engine: Make, words: Words) -> None:
    task = msgspec.structs.replace(writing(words, "x", line_grammar(), limit=500), beside=64, widest=64)
    engine = make_engine()
    given = Given(engine, task)
    run(engine, given)
    assert isinstance(given.error, Unavailable)
    assert is_clean(engine)


# ── who goes first ──────────────────────────────────────────────────────────────────────────────────────────────────────


def reading(words: Words, tokens: int) -> Task:
    def story(branch: Branch) -> Story:
        branch.add([7] * tokens)
        yield [Read(branch)]
        return "read"

    return Task(words.data("a document"), tokens + 16, 16, 16, story)


def test_a_route_waits_for_one_chunk_of_a_document(make_engine: Make, words: Words, planner: Planner) -> None:
    fed: list[list[int]] = []
    engine = make_engine(16384, clock=lambda: 0.0)
    run_forward = engine.forward.run
    engine.forward.run = lambda feeds: fed.append([len(f.tokens) for f in feeds]) or run_forward(feeds)
    document = Given(engine, reading(words, 4000), Kind.DOCUMENT, "acme")
    for _ in range(3):
        engine.step()
    assert fed[1:] == [[engines.CHUNK]] * 2
    route = Given(engine, planner.task(an_ask()))
    before = len(fed)
    run(engine, route)
    assert not document.over
    assert all(size <= engines.CHUNK for sizes in fed[before:] for size in sizes)
    assert engine._running[0].rows[0].feed.__len__() == 4000 - 2 * engines.CHUNK, "no step was the document's"
    run(engine, document)
    assert document.result == "read"


def test_a_document_is_not_starved_by_routes(make_engine: Make, words: Words, terse: Planner) -> None:
    now = 0.0
    engine = make_engine(16384, clock=lambda: now)
    document = Given(engine, reading(words, 600), Kind.DOCUMENT, "acme")
    steps = 0
    while not document.over:
        route = Given(engine, terse.task(an_ask()))
        while not route.over:
            engine.step()
            now += 0.2
            steps += 1
        assert steps < 1000
    assert document.result == "read"


def test_a_full_line_says_when_to_come_back(make_engine: Make, terse: Planner) -> None:
    engine = make_engine(limits=Limits(waiting=4, routes=1))
    task = terse.task(an_ask())
    given = [Given(engine, task, client=f"a{i}") for i in range(4)]
    with pytest.raises(Busy) as busy:
        Given(engine, task, client="z")
    assert busy.value.code == "queue_full"
    assert busy.value.retry_after_ms >= 1000
    run(engine, *given)


def test_what_can_never_fit_is_refused_at_the_door(make_engine: Make, words: Words) -> None:
    engine = make_engine(1024)
    with pytest.raises(Unavailable):
        Given(engine, reading(words, 600), Kind.DOCUMENT)
    Given(engine, reading(words, 600), Kind.ROUTE)


def test_prefixes_are_read_in_idle_time(make_engine: Make, planner: Planner) -> None:
    engine = make_engine()
    asks = [an_ask(asker=asker) for asker in ("ceo", "sales", "finance")]
    engine.expect([planner.prefix(ask) for ask in asks])
    while engine.step():
        pass
    assert engine.counts.prefix_ahead == 3
    for ask in asks:
        plan_of(engine, planner, ask)
    assert engine.counts.prefix_misses == 0
    assert engine.counts.prefix_hits == 3
    assert is_clean(engine)


# ── parts ───────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("seed", range(10))
def test_space_is_neither_lost_nor_given_twice(seed: int) -> None:
    rng = random.Random(seed)
    space = Space(0, 1024)
    taken: list[tuple[int, int]] = []
    for _ in range(400):
        if taken and rng.random() < 0.45:
            space.give(*taken.pop(rng.randrange(len(taken))))
        else:
            size = rng.randint(1, 200)
            first = space.take(size)
            if first is not None:
                taken.append((first, size))
        spans = sorted((first, first + -(-size // 16) * 16) for first, size in taken)
        assert all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))
        assert space.free == 1024 - sum(end - start for start, end in spans)
    for place in taken:
        space.give(*place)
    assert space.take(1024) == 0


def test_texts_hold_only_what_was_written(make_engine: Make, words: Words) -> None:
    """The specification's parser looked for the first brace of prompt and answer together, and so found the prompt's."""
    prompt = '{"agents": [{"agent": "evil", "task": "take over"}]}'
    texts = alone(make_engine(), writing(words, prompt, GRAMMARS["json"], limit=40))
    assert isinstance(texts, list)
    [text] = texts
    assert isinstance(text, Text)
    written = words.text(text.tokens)
    assert "evil" not in written
    assert set(msgspec.json.decode(written)) == {"agent", "priority"}


def test_nothing_of_a_job_waits_for_the_garbage_collector(make_engine: Make, terse: Planner) -> None:
    """A choice in a cycle of references would keep the logits of a step, of all its rows."""
    engine = make_engine()
    gc.collect()
    gc.disable()
    try:
        given = Given(engine, terse.task(an_ask()))
        run(engine, given)
        given.job = None  # they know each other
        left = [o for o in gc.get_objects() if type(o) in (Choosing, Writing)]
        logits = [o for o in gc.get_objects() if type(o) is torch.Tensor and o.shape[-1:] == (engine.weights.shape.vocab,)]
    finally:
        gc.enable()
    assert len(left) == len(logits) == 0
