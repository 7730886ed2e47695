"""Who waits, who runs, who is refused."""

from __future__ import annotations

import random

import pytest

from hubpeer.jobs import Kind, Limits, Line, Refused, Ticket


def admitted(line: Line, kind: Kind, client: str, now: float = 0.0, deadline: float | None = None) -> Ticket:
    ticket = line.offer(kind, client, now, deadline)
    assert isinstance(ticket, Ticket)
    return ticket


def everything_fits(_: Ticket) -> bool:
    return True


def test_routes_start_before_documents_that_came_first() -> None:
    line = Line(Limits())
    document = admitted(line, Kind.DOCUMENT, "acme")
    route = admitted(line, Kind.ROUTE, "sales")
    assert line.start(everything_fits) == route
    assert line.start(everything_fits) == document
    assert line.start(everything_fits) is None


def test_the_client_that_used_least_is_next() -> None:
    line = Line(Limits(documents=1))
    greedy = [admitted(line, Kind.DOCUMENT, "greedy") for _ in range(4)]
    first = line.start(everything_fits)
    assert first == greedy[0]
    modest = admitted(line, Kind.DOCUMENT, "modest")
    line.leave(first, used_s=5.0, finished=True)
    assert line.start(everything_fits) == modest, "greedy has had five seconds, modest none"
    line.leave(modest, used_s=1.0, finished=True)
    assert line.start(everything_fits) == greedy[1]


def test_an_idle_client_saves_up_no_credit() -> None:
    line = Line(Limits(documents=1))
    for _ in range(3):
        admitted(line, Kind.DOCUMENT, "busy")
        line.leave(line.start(everything_fits), used_s=10.0, finished=True) if _ < 2 else None
    admitted(line, Kind.DOCUMENT, "busy")
    late = admitted(line, Kind.DOCUMENT, "late")
    served = []
    while ticket := line.start(everything_fits):
        served.append(ticket.client)
        line.leave(ticket, used_s=1.0, finished=True)
    assert served == ["busy", "late", "busy"], late


def test_a_full_line_refuses_with_the_expected_wait() -> None:
    line = Line(Limits(waiting=4, routes=1))
    admitted(line, Kind.ROUTE, "a")
    running = line.start(everything_fits)
    for client in "abcd":
        admitted(line, Kind.ROUTE, client)
    refused = line.offer(Kind.ROUTE, "e", 0.0)
    assert isinstance(refused, Refused)
    assert refused.waiting == 4
    assert refused.retry_after_s == pytest.approx(5 * 2.0), "five routes of two seconds each"
    assert isinstance(line.offer(Kind.DOCUMENT, "e", 0.0), Ticket), "documents have a line of their own"
    line.leave(running, used_s=2.0, finished=True)
    assert line.refused == 1


def test_one_client_cannot_shut_the_others_out() -> None:
    line = Line(Limits(waiting=8, documents=1))
    taken = [line.offer(Kind.DOCUMENT, "flood", 0.0) for _ in range(20)]
    assert sum(isinstance(t, Ticket) for t in taken) == 4
    assert isinstance(line.offer(Kind.DOCUMENT, "other", 0.0), Ticket)


def test_who_would_be_late_is_refused_at_once() -> None:
    line = Line(Limits(routes=1))
    admitted(line, Kind.ROUTE, "a")
    line.start(everything_fits)
    admitted(line, Kind.ROUTE, "b")
    assert isinstance(line.offer(Kind.ROUTE, "c", now=0.0, deadline=1.0), Refused), "it would start in four seconds"
    assert isinstance(line.offer(Kind.ROUTE, "c", now=0.0, deadline=60.0), Ticket)


def test_deadlines_pass_for_those_who_wait_and_those_who_run() -> None:
    line = Line(Limits(routes=1))
    runs = admitted(line, Kind.ROUTE, "a", deadline=5.0)
    line.start(everything_fits)
    waits = admitted(line, Kind.ROUTE, "b", deadline=6.0)
    assert line.late(4.9) == []
    assert set(line.late(6.0)) == {runs, waits}


def test_a_route_without_room_holds_documents_back() -> None:
    line = Line(Limits())
    route = admitted(line, Kind.ROUTE, "a")
    admitted(line, Kind.DOCUMENT, "acme")
    assert line.start(lambda t: t.kind is Kind.DOCUMENT) is None
    assert line.start(everything_fits) == route


def test_a_starved_document_gets_a_step() -> None:
    line = Line(Limits(starved_s=2.0))
    admitted(line, Kind.ROUTE, "a")
    admitted(line, Kind.DOCUMENT, "acme")
    line.start(everything_fits)
    line.start(everything_fits)
    turns = [line.turn(now / 10) for now in range(60)]
    assert [i for i, turn in enumerate(turns) if Kind.DOCUMENT in turn] == [20, 40]
    assert all(Kind.ROUTE in turn for turn in turns)


def test_leaving_twice_does_no_harm() -> None:
    line = Line(Limits())
    ticket = admitted(line, Kind.ROUTE, "a")
    line.leave(ticket)
    line.leave(ticket)
    assert line.waiting(Kind.ROUTE) == line.running(Kind.ROUTE) == 0


@pytest.mark.parametrize("seed", range(20))
def test_any_order_of_events_keeps_the_books(seed: int) -> None:
    rng = random.Random(seed)
    limits = Limits(waiting=6, routes=3, documents=2)
    line = Line(limits)
    waiting: set[Ticket] = set()
    running: set[Ticket] = set()
    for step in range(300):
        match rng.randrange(3):
            case 0:
                offered = line.offer(rng.choice(list(Kind)), rng.choice("abc"), float(step))
                if isinstance(offered, Ticket):
                    waiting.add(offered)
            case 1:
                started = line.start(lambda _: rng.random() < 0.8)
                if started is not None:
                    waiting.remove(started)
                    running.add(started)
            case _:
                everyone = sorted(waiting | running, key=lambda t: t.number)
                if everyone:
                    gone = rng.choice(everyone)
                    waiting.discard(gone)
                    running.discard(gone)
                    line.leave(gone, rng.random(), finished=rng.random() < 0.5)
        for kind in Kind:
            assert line.waiting(kind) == sum(t.kind is kind for t in waiting) <= limits.waiting
            assert line.running(kind) == sum(t.kind is kind for t in running)
        assert line.running(Kind.ROUTE) <= limits.routes
        assert line.running(Kind.DOCUMENT) <= limits.documents
        assert line.expected_wait(Kind.ROUTE) >= 0
