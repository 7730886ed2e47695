"""From a question to a draft of a plan: decisions first, then the texts, side by side.

The model is never asked to write a plan and then checked: it chooses among what a plan can be. Who comes next and at which
level is a choice among the agents that are left, so no plan can name an unknown agent, the asker, or one twice, and
`depends_on` can only point to the level before. Only then are the tasks written, as plain lines of text, all at once.
"""

from __future__ import annotations

import itertools
import json

from hubpeer.model import DraftStep, PlanAsk, PlanDraft, card_set
from hubpeer.model.forward import units
from hubpeer.model.grammar import line_grammar
from hubpeer.model.prompt import Layout, Words, filled, system_part, user_part
from hubpeer.model.requests import Branch, Choice, Choose, Request, Story, Task, Text, Write
from hubpeer.wire import Alternative, ConflictRule

#: The question may take this many tokens; of a longer one the model reads the start and the end.
QUESTION: int = 1024
CONTEXT: int = 512


class Planner:
    """Makes tasks for the engine out of questions."""

    def __init__(self, words: Words, layout: Layout, max_context: int) -> None:
        self._words, self._layout, self._context = words, layout, max_context
        self._grammar = line_grammar()

    def prefix(self, ask: PlanAsk) -> list[int]:
        """What all questions of this asker to these agents begin with."""
        texts = self._layout.plan
        cards = ""
        for line in card_set(ask.cards):
            agent, _, card = line.partition(": ")
            cards += filled(texts.card, agent=agent, card=card)
        whole = system_part(self._words, self._layout.chat, filled(texts.system, cards=cards, asker=ask.asker))
        # 64 agents with cards of 64 long words each would not leave room for the question.
        return whole if len(whole) <= self._context // 2 else self._shortened(ask)

    def _shortened(self, ask: PlanAsk) -> list[int]:
        """The same with as much of each card as there is room for: every agent stays choosable."""
        texts = self._layout.plan
        bare = system_part(self._words, self._layout.chat, filled(texts.system, cards="", asker=ask.asker))
        each = (self._context // 2 - len(bare)) // len(ask.cards)
        cards: list[int] = []
        for line in card_set(ask.cards):
            agent, _, card = line.partition(": ")
            tokens = self._words.data(filled(texts.card, agent=agent, card=card).rstrip())
            cards += [*tokens[: max(each - 1, 0)], *self._words.data("\n")]
        before, _, after = texts.system.strip().partition("{cards}")
        chat, words = self._layout.chat, self._words
        return [
            *words.marker(chat.begin + chat.system),
            *words.data(filled(before, asker=ask.asker)),
            *cards,
            *words.data(filled(after, asker=ask.asker)),
            *words.marker(chat.end + chat.user),
        ]

    def task(self, ask: PlanAsk) -> Task:
        texts, words = self._layout.plan, self._words
        prefix = self.prefix(ask)
        question, shortened = self._cut(filled(texts.user, asker=ask.asker, query=ask.query), QUESTION)
        parts = list(question)
        if ask.context:
            known = json.dumps(ask.context, ensure_ascii=False, sort_keys=True)
            parts += self._cut(filled(texts.context, context=known), CONTEXT)[0]
        parts += user_part(words, self._layout.chat, [])
        parts += words.data(texts.plan)
        names = {agent: words.data(filled(texts.agent, agent=agent)) for agent in sorted(ask.cards)}
        longest = max(map(len, names.values()))
        step = longest + len(words.data(texts.together)) + len(words.data(texts.then))
        line = len(parts) + min(ask.max_agents, len(names)) * step + 8
        widest_name = max(names, key=lambda agent: len(names[agent]))
        leads = [texts.task, texts.data, texts.needs, texts.why, texts.rule]
        lead = 8 + max(len(words.data(filled(text, agent=widest_name))) for text in leads)
        widest = 16 + step + lead + max(texts.task_tokens, texts.data_tokens, texts.why_tokens)
        return Task(
            prefix=prefix,
            line=line,
            beside=units(widest) * (2 * min(ask.max_agents, len(names), 3) + 1),
            widest=widest,
            story=lambda branch: self._story(ask, branch, parts, names, shortened),
        )

    def _cut(self, text: str, limit: int) -> tuple[list[int], bool]:
        """`text` as tokens; of a long one the first and the last."""
        tokens = self._words.data(text)
        if len(tokens) <= limit:
            return tokens, False
        gap = self._words.data(" [...] ")
        half = (limit - len(gap)) // 2
        return [*tokens[:half], *gap, *tokens[-half:]], True

    # ── the story ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def _story(self, ask: PlanAsk, branch: Branch, parts: list[int], names: dict[str, list[int]], shortened: bool) -> Story:
        texts, words = self._layout.plan, self._words
        branch.add(parts)
        levels, confidence, nearest = yield from self._who(ask, branch, names)
        chosen = [agent for level in levels for agent in level]
        end = words.data(texts.done)
        branch.add(end)

        requests: list[Request] = []
        waits = [(agent, before) for before, level in itertools.pairwise(levels) for agent in level if len(before) > 1]
        rules = list(ask.rules) if len(chosen) > 1 else []
        if len(rules) > 1:
            requests.append(Choose(branch, [words.data(f" {rule}") for rule in rules], words.data(texts.rule), end))
        for agent, before in waits:
            options = [*(names[a] for a in before), words.data(texts.all)]
            requests.append(Choose(branch, options, words.data(filled(texts.needs, agent=agent)), end))
        for agent in chosen:
            requests.append(Write(branch, words.data(filled(texts.task, agent=agent)), self._grammar, texts.task_tokens))
            requests.append(Write(branch, words.data(filled(texts.data, agent=agent)), self._grammar, texts.data_tokens))
        requests.append(Write(branch, words.data(texts.why), self._grammar, texts.why_tokens))
        answers = iter((yield requests))

        rule: ConflictRule | None = rules[0] if rules else None
        if len(rules) > 1:
            rule = rules[_chosen(next(answers)).index]
        needs = {agent: list(before) for before, level in itertools.pairwise(levels) for agent in level}
        for agent, before in waits:
            index = _chosen(next(answers)).index
            needs[agent] = list(before) if index == len(before) else [before[index]]
        steps = []
        for agent in chosen:
            task, data = _text(next(answers)), _text(next(answers))
            steps.append(
                DraftStep(
                    agent,
                    tidy(words.text(task.tokens), task.complete) or ask.query[:500],
                    needs.get(agent, []),
                    items(words.text(data.tokens), data.complete),
                )
            )
        why = _text(next(answers))
        reasoning = tidy(words.text(why.tokens), why.complete)
        if shortened:
            reasoning += " (The question was too long to be read whole: its start and its end were.)"
        return PlanDraft(steps, rule, reasoning.strip(), confidence, nearest)

    def _who(
        self, ask: PlanAsk, branch: Branch, names: dict[str, list[int]]
    ) -> Story:  # returns levels, the probability of all these choices, and who else came near
        texts, words = self._layout.plan, self._words
        together, then, done = words.data(texts.together), words.data(texts.then), words.data(texts.done)
        ends = [together[0], then[0], done[0]]
        levels: list[list[str]] = []
        confidence = 1.0
        near: dict[str, float] = {}
        left = list(names)
        while left and sum(map(len, levels)) < ask.max_agents:
            # Each option: its tokens, who it adds, and whether to the last level or to a new one.
            ways = [(names[agent], agent, True) for agent in left]
            if levels:
                ways = [([*together, *names[agent]], agent, False) for agent in left]
                ways += [([*then, *names[agent]], agent, True) for agent in left]
                ways.append((done, "", False))
            if len(ways) == 1:
                index, shares = 0, [1.0]
            else:
                answer = _chosen((yield [Choose(branch, [tokens for tokens, _, _ in ways], ends=ends)])[0])
                index, shares = answer.index, answer.probabilities
            for agent in left:
                here = sum(share for (_, named, _), share in zip(ways, shares, strict=True) if named == agent)
                near[agent] = max(near.get(agent, 0.0), here)
            confidence *= shares[index]
            tokens, agent, opens = ways[index]
            if not agent:
                break
            branch.add(tokens)
            left.remove(agent)
            if opens:
                levels.append([agent])
            else:
                levels[-1].append(agent)
        runners = sorted(((near[agent], agent) for agent in left if agent in near), key=lambda pair: (-pair[0], pair[1]))
        return levels, confidence, [Alternative(agent, min(1.0, score)) for score, agent in runners[:5]]


def _chosen(answer: object) -> Choice:
    assert isinstance(answer, Choice)
    return answer


def _text(answer: object) -> Text:
    assert isinstance(answer, Text)
    return answer


def tidy(text: str, complete: bool) -> str:
    """A written line as one line; one that ran into its limit ends at its last sentence, or else at its last word."""
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if complete or not text:
        return text
    sentence = max(text.rfind(sign) for sign in ".!?")
    if sentence >= len(text) // 2:
        return text[: sentence + 1]
    words = text.rsplit(" ", 1)
    return f"{words[0]}…" if len(words) == 2 else text


def items(text: str, complete: bool, most: int = 8) -> list[str]:
    """A written list, semicolons between, as its items; the last of a list that ran into its limit is left out."""
    found = [item for part in text.split(";") if (item := tidy(part, True).strip(" .,\"'()")[:200])]
    if not complete and len(found) > 1:
        found.pop()
    return list(dict.fromkeys(found))[:most]
