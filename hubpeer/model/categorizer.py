"""From a document to its record: category, sensitivity, who should know, and two short texts, all from one reading."""

from __future__ import annotations

from typing import Final, cast, get_args

from hubpeer.model import DocAsk
from hubpeer.model.forward import units
from hubpeer.model.grammar import line_grammar
from hubpeer.model.planner import items, tidy
from hubpeer.model.prompt import Layout, Words, filled, system_part, user_part
from hubpeer.model.requests import Branch, Choice, Choose, Request, Story, Task, Text, Write
from hubpeer.taxonomy import MAX_ENTITIES
from hubpeer.wire import Categorization, Sensitivity

SENSITIVITIES: Final[tuple[Sensitivity, ...]] = get_args(Sensitivity)
#: Asked about one by one, in name order; a hub with more agents than this should say in its taxonomy who cares for what.
MOST_AGENTS: Final = 16
#: Where a long document is read: shares of the budget for its head, its middle and its end.
HEAD, MIDDLE = 0.5, 0.35
#: Characters of a text that one token stands for, at least. Texts with fewer are cut again after they have been counted.
DENSE: Final = 3.0


class Categorizer:
    """Makes tasks for the engine out of documents."""

    def __init__(self, words: Words, layout: Layout, max_tokens: int) -> None:
        self._words, self._layout, self._most = words, layout, max_tokens
        self._grammar = line_grammar()

    def task(self, ask: DocAsk) -> Task:
        texts, words, chat = self._layout.document, self._words, self._layout.chat
        agents = sorted(ask.agents)[:MOST_AGENTS]
        names = sorted(ask.taxonomy)
        categories = "".join(filled(texts.category, category=name, definition=ask.taxonomy[name].definition) for name in names)
        prefix = system_part(words, chat, filled(texts.system, categories=categories, agents=", ".join(agents) or "none"))
        options = {name: words.data(filled(texts.option, name=name)) for name in names}
        leads = {agent: words.data(filled(texts.agent, agent=agent)) for agent in agents}
        written = [*texts.summary, *texts.entities]
        lead = max([len(words.data(text)) for text in written] + [len(t) for t in leads.values()])
        widest = 32 + lead + max(texts.summary_tokens, texts.entities_tokens)
        beside = len(written) * units(widest) + 3 * 32
        tail = user_part(words, chat, []) + words.data(texts.answer)
        decisions = max(len(tokens) for tokens in options.values()) + 16
        budget = self._most - units(len(prefix)) - beside - len(tail) - decisions - 2 * 16
        body, read = self._body(ask, max(budget, 64))
        parts = [*body, *tail]
        return Task(
            prefix=prefix,
            line=len(parts) + decisions,
            beside=beside,
            widest=widest,
            story=lambda branch: self._story(ask, branch, parts, options, leads, read),
        )

    # ── what is read of a long document ─────────────────────────────────────────────────────────────────────────────────

    def _body(self, ask: DocAsk, budget: int) -> tuple[list[int], int]:
        """The document as tokens, at most `budget`, and how many characters of its text they stand for."""
        share = 1.0
        while True:
            text, read = excerpt(ask.text, ask.headings, int(budget * DENSE * 2 * share), self._layout.document.left_out)
            tokens = self._words.data(
                filled(
                    self._layout.document.user,
                    filename=ask.filename[:120] or "-",
                    title=ask.title[:200] or "-",
                    headings="; ".join(h[:80] for h in ask.headings[:12]) or "-",
                    text=text,
                )
            )
            if len(tokens) <= budget:
                return tokens, read
            if share < 0.01:
                return tokens[:budget], 0  # a budget that not even the headings fit into
            share *= max(0.3, min(0.97, budget / len(tokens) * 0.98))

    # ── the story ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _story(
        self,
        ask: DocAsk,
        branch: Branch,
        parts: list[int],
        options: dict[str, list[int]],
        leads: dict[str, list[int]],
        read: int,
    ) -> Story:
        texts, words = self._layout.document, self._words
        end = words.data("\n")
        branch.add(parts)
        names = list(options)
        category, shares = names[0], [1.0]
        if len(names) > 1:
            choice = (yield [Choose(branch, list(options.values()), ends=end)])[0]
            assert isinstance(choice, Choice)
            category, shares = names[choice.index], choice.probabilities
        branch.add([*options[category], *end])
        yes_no = [words.data(texts.yes), words.data(texts.no)]
        levels = [words.data(filled(texts.option, name=name)) for name in SENSITIVITIES]
        requests: list[Request] = [Choose(branch, levels, words.data(texts.sensitivity), end)]
        requests += [Choose(branch, yes_no, lead, end) for lead in leads.values()]
        requests += [Write(branch, words.data(text), self._grammar, texts.summary_tokens) for text in texts.summary]
        requests += [Write(branch, words.data(text), self._grammar, texts.entities_tokens) for text in texts.entities]
        answers = iter((yield requests))
        sensitivity = cast("Choice", next(answers))
        cares = [cast("Choice", next(answers)) for _ in leads]
        said = [cast("Text", next(answers)) for _ in texts.summary]
        lists = [cast("Text", next(answers)) for _ in texts.entities]
        relevant = [agent for agent, care in zip(leads, cares, strict=True) if care.index == 0]
        lines = [tidy(words.text(text.tokens), text.complete) for text in said]
        named = [item for text in lists for item in items(words.text(text.tokens), text.complete)]
        ranked = sorted(zip(shares, names, strict=True), key=lambda pair: (-pair[0], pair[1]))
        return Categorization(
            category=category,
            confidence=min(1.0, shares[names.index(category)]),
            summary=" ".join(dict.fromkeys(filter(None, lines))),
            sensitivity=SENSITIVITIES[sensitivity.index],
            relevant_agents=relevant or [agent for agent in ask.taxonomy[category].agents if agent in ask.agents],
            key_entities=list(dict.fromkeys(named))[:MAX_ENTITIES],
            method="llm_intelligent",
            alternatives=[{"category": name, "score": round(share, 4)} for share, name in ranked if name != category][:3],
            read_chars=read,
            total_chars=len(ask.text),
        )


def excerpt(text: str, headings: list[str], budget: int, left_out: str) -> tuple[str, int]:
    """At most `budget` characters of `text`, and how many of them are the document's own.

    The head counts most, then the end; the middle is read where its headings stand, or else at even distances. Every gap is
    marked with `left_out` and how much is missing, so neither the model nor the record takes the part for the whole.
    """
    if len(text) <= budget:
        return text, len(text)
    if budget < 400:
        return text[:budget], min(len(text), budget)
    head, middle = int(budget * HEAD), int(budget * MIDDLE)
    tail = budget - head - middle
    spans = [(0, head), (len(text) - tail, len(text))]
    places = [at for heading in headings if heading and head < (at := text.find(heading, head)) < len(text) - tail]
    pieces = max(1, min(6, middle // 300))
    if len(places) > pieces:
        places = [places[i * len(places) // pieces] for i in range(pieces)]
    if not places:
        gap = (len(text) - head - tail) / pieces
        places = [int(head + gap * (i + 0.5) - middle / pieces / 2) for i in range(pieces)]
    spans += [(max(head, at), min(at + middle // len(places), len(text) - tail)) for at in places]
    parts: list[str] = []
    read = at = 0
    for start, stop in sorted(spans):
        if stop <= at:
            continue
        start = max(start, at)
        if start > at:
            # Begin at a line or a word, unless that is far away.
            edge = max(text.find("\n", start, start + 80), text.find(" ", start, start + 40))
            start = edge + 1 if edge >= 0 and edge + 1 < stop else start
            parts.append(filled(left_out, characters=f"{start - at:,}"))
        parts.append(text[start:stop])
        read += stop - start
        at = stop
    return "".join(parts), read
