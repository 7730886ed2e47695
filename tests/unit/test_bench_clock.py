"""The benchmark's clock: what counts as standing still."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[2]))  # `bench` is no part of the package

from bench.clock import Clock, common


@pytest.mark.parametrize(
    ("gaps", "lost"),
    [
        ([[], []], 0),
        ([[(1, 3)], []], 0),  # the other core was there
        ([[(1, 3)], [(2, 5)]], 1),
        ([[(1, 3), (4, 6)], [(2, 5)]], 2),
        ([[(-5, 20)], [(-9, 12)]], 10),  # no more than the interval
        ([[(-5, -1)], [(-4, -2)]], 0),
        ([[(2, 2.5), (3, 4)]], 1.5),  # a machine with one core
    ],
)
def test_time_is_lost_when_no_core_is_there(gaps, lost):
    assert common(gaps, 0, 10) == pytest.approx(lost)


def test_work_is_given_at_most_its_wall_time():
    with Clock() as clock:
        lap = clock.time(lambda: sum(range(200_000)))
    assert 0 < lap.given <= lap.wall
