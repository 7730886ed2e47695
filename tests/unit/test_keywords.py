from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hubpeer import keywords, plan
from hubpeer.plan import Question, RoutingDecision
from hubpeer.settings import DEFAULT_AGENTS, Routing
from hubpeer.wire import Card

DEFAULTS = Routing().default_agents
RULES = Routing().conflict_rules
LEGAL = Card(["contract_review", "patent_law"], ["data_protection"])
SUPPORT = Card(["ticket_handling"], ["refund_requests"])


def routed(query: str, asker: str = "hr", cards: dict[str, Card] = DEFAULT_AGENTS, defaults=DEFAULTS) -> RoutingDecision | None:
    """What the fallback gives, through the same check every plan passes."""
    draft = keywords.draft(query, asker, cards, defaults, max_agents=6)
    if draft is None:
        return None
    others = set(cards) - {asker}
    question = Question(asker, query, RULES, "consensus_required", 6)
    decision = plan.build(draft, question, others, "fallback_keywords", "p1", "2026-01-01T00:00:00.000+00:00", "no_model")
    assert isinstance(decision, RoutingDecision), decision
    return decision


def chosen(query: str, asker: str = "hr", cards: dict[str, Card] = DEFAULT_AGENTS) -> list[str]:
    found = routed(query, asker, cards)
    return [step.agent for step in found.agents] if found else []


# ── words ───────────────────────────────────────────────────────────────────────────────────────────────────────────────

SPECIFICATION = {
    "finance": "budget, cost, revenue, financial, roi, profit",
    "marketing": "campaign, marketing, customer, acquisition, conversion",
    "sales": "sales, pipeline, deal, quota, forecast",
    "ceo": "strategy, board, executive, strategic, competitive",
}


@pytest.mark.parametrize(("agent", "word"), [(a, w) for a, words in SPECIFICATION.items() for w in words.split(", ")])
def test_each_word_of_the_specification_finds_its_agent_however_it_is_written(agent, word):
    for written in (word, word.upper(), word.capitalize(), f"({word})", f"{word}?", f"re:{word}/2026", f"{word}-wide"):
        assert keywords.matches(f"please look at {written} today", DEFAULT_AGENTS) == {agent: [word]}


def test_the_rule_has_no_words_beyond_the_specifications():
    assert {agent: ", ".join(words) for agent, words in keywords.KEYWORDS.items()} == SPECIFICATION


@pytest.mark.parametrize(
    ("said", "word"),
    [
        ("budgets", "budget"), ("budgeting", "budget"), ("budgeted", "budget"), ("costs", "cost"), ("costly", "cost"),
        ("revenues", "revenue"), ("financially", "financial"), ("profits", "profit"), ("campaigns", "campaign"),
        ("customers", "customer"), ("customer's", "customer"), ("acquisitions", "acquisition"), ("conversions", "conversion"),
        ("pipelines", "pipeline"), ("deals", "deal"), ("quotas", "quota"), ("forecasts", "forecast"),
        ("forecasting", "forecast"), ("strategies", "strategy"), ("boards", "board"), ("executives", "executive"),
        ("strategically", "strategic"), ("competitively", "competitive"), ("ＲＯＩ", "roi"),
    ],
)  # fmt: skip
def test_plurals_and_simple_endings_count(said, word):
    assert [hit for hits in keywords.matches(said, DEFAULT_AGENTS).values() for hit in hits] == [word]


@pytest.mark.parametrize(
    "said",
    """onboarding boarding boarded dashboard keyboard cupboard boarder ideal dealing dealership heroic roidx accost costume
    pentecost unprofitable nonprofit wholesales pipelineless market marketplace acquire converse strategist customize
    budgetary""".split(),
)
def test_a_word_inside_another_word_does_not_count(said):
    assert keywords.matches(f"the {said} of our team", DEFAULT_AGENTS) == {}


# ── the plan ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_one_agent_is_a_single_plan():
    found = routed("What is our revenue?")
    assert (found.workflow_type, found.estimated_time_minutes, found.conflict_resolution) == ("single", 3, "consensus_required")
    (step,) = found.agents
    assert (step.agent, step.priority, step.depends_on, step.data_needed) == ("finance", 1, [], ["revenue"])


def test_several_agents_are_a_chain_in_the_specifications_order_three_minutes_each():
    found = routed("The board asks for the sales forecast, the campaign and the budget")
    assert [(s.agent, s.priority, s.depends_on) for s in found.agents] == [
        ("finance", 1, []),
        ("marketing", 2, ["finance"]),
        ("sales", 3, ["marketing"]),
        ("ceo", 4, ["sales"]),
    ]
    assert (found.workflow_type, found.estimated_time_minutes) == ("sequential", 12)
    assert found.conflict_resolution == "consensus_required"


def test_the_answer_says_it_is_the_fallback_and_which_words_it_saw():
    found = routed("Costs and budgets of the campaign")
    assert (found.routing_method, found.fallback_used, found.fallback_reason) == ("fallback_keywords", True, "no_model")
    assert found.reasoning == "Keywords matched: finance: cost, budget; marketing: campaign."


def test_the_order_of_the_plan_does_not_depend_on_the_order_of_the_question_or_of_the_cards():
    backwards = dict(reversed(DEFAULT_AGENTS.items()))
    for query in ("budget then pipeline", "pipeline then budget"):
        assert chosen(query) == chosen(query, cards=backwards) == ["finance", "sales"]


def test_a_plan_takes_no_more_agents_than_it_may():
    draft = keywords.draft("budget campaign pipeline board", "hr", DEFAULT_AGENTS, DEFAULTS, max_agents=2)
    assert [s.agent for s in draft.agents] == ["finance", "marketing"]


# ── nobody matches ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asker", "default", "reasoning"),
    [
        ("hr", "finance", "No keyword matched; finance is the default agent."),
        (
            "finance", "ceo",
            "No keyword matched; ceo is the default agent. finance comes before it but asked the question itself.",
        ),
        ("ceo", "finance", "No keyword matched; finance is the default agent."),
    ],
)  # fmt: skip
def test_a_question_without_keywords_goes_to_the_default_agent_and_says_so(asker, default, reasoning):
    found = routed("Where is the coffee machine?", asker)
    assert (found.workflow_type, found.reasoning) == ("single", reasoning)
    assert [(s.agent, s.data_needed) for s in found.agents] == [(default, [])]


@pytest.mark.parametrize(
    ("cards", "defaults"),
    [
        ({"finance": DEFAULT_AGENTS["finance"]}, ["finance", "ceo"]),  # the asker alone
        (DEFAULT_AGENTS, []),  # the operator wants no default
        (DEFAULT_AGENTS, ["finance"]),  # the default asks itself
        ({}, ["finance", "ceo"]),
    ],
)
def test_there_is_no_plan_where_no_default_agent_is_left(cards, defaults):
    assert routed("Where is the coffee machine?", "finance", cards, defaults) is None


def test_an_expired_default_agent_is_passed_over():
    there = {name: card for name, card in DEFAULT_AGENTS.items() if name != "finance"}
    assert chosen("Where is the coffee machine?", "hr", there) == ["ceo"]


def test_the_runners_up_come_with_the_share_of_the_questions_words_their_card_holds():
    near = keywords.runners_up("who may review this contract", {"legal": LEGAL, "support": SUPPORT, "ceo": Card(["chess"])})
    assert [(a.agent, a.score) for a in near] == [("legal", 0.4), ("ceo", 0.0), ("support", 0.0)]


# ── agents the specification does not know ──────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("query", "agents"),
    [
        ("Is this contract fine?", ["legal"]),
        ("Two refunds and a ticket, and the patents", ["support", "legal"]),  # more words come first
        ("The budget of the contract", ["finance", "legal"]),  # after those of the specification
        ("A general review of the data", []),  # words every card holds say nothing
    ],
)
def test_registered_agents_are_found_by_the_words_of_their_cards(query, agents):
    assert list(keywords.matches(query, {"support": SUPPORT, "legal": LEGAL, **DEFAULT_AGENTS})) == agents


@given(
    st.lists(st.sampled_from("budget campaigns pipeline board contract refund the our of onboarding ?".split()), max_size=12),
    st.sampled_from([*DEFAULT_AGENTS, "legal", "support", "hr"]),
)
def test_the_asker_never_gets_its_own_question(said, asker):
    cards = {**DEFAULT_AGENTS, "legal": LEGAL, "support": SUPPORT}
    names = chosen(" ".join(said) or "?", asker, cards)
    assert names
    assert asker not in names


# ── the three scenarios of the specification ────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("asker", "query", "steps"),
    [
        # As in the specification: marketing. ("ROI" and "budget" are finance's own words, and finance asks.)
        (
            "finance",
            "I need ROI analysis for our Q4 holiday marketing campaign to validate budget allocation",
            [("marketing", [], ["marketing", "campaign"])],
        ),
        # Less than the specification's finance, sales and marketing: "acquire", "market" and "integration" are no keywords.
        (
            "ceo",
            "Should we acquire Company X? I need comprehensive analysis of financial impact, market implications, and "
            "integration complexity",
            [("finance", [], ["financial"])],
        ),
        # Less than the specification's finance, then sales: no word of sales is said.
        (
            "marketing",
            "How should I reallocate my Q1 marketing budget across digital channels for maximum ROI?",
            [("finance", [], ["budget", "roi"])],
        ),
    ],
)
def test_what_the_fallback_gives_for_each_scenario(asker, query, steps):
    found = routed(query, asker)
    assert [(s.agent, s.depends_on, s.data_needed) for s in found.agents] == steps
    assert (found.workflow_type, found.estimated_time_minutes, found.conflict_resolution) == ("single", 3, "consensus_required")
    assert [s.task for s in found.agents] == [f"Answer for {steps[0][0]}: {query}"]
    assert (found.original_query, found.requesting_agent, found.fallback_used) == (query, asker, True)
