"""One of the demo's four spokes: `python -m hubpeer.cli.demo_spoke finance`. It answers with a sentence, at once."""

from __future__ import annotations

import logging
import sys

from hubpeer.settings import DEFAULT_AGENTS
from hubpeer.spoke import Done, Spoke, Step


def spoke(agent: str) -> Spoke:
    """A spoke with the default card of `agent`."""
    card = DEFAULT_AGENTS[agent]
    made = Spoke(agent, card.capabilities, card.specialties)

    @made.step
    async def work(step: Step) -> Done:
        seen = f", having read {', '.join(step.results)}" if step.results else ""
        return Done({"summary": f"{agent} looked at it{seen}"}, verdict="approve")

    return made


if __name__ == "__main__":
    logging.basicConfig(level=logging.WARNING)
    spoke(sys.argv[1]).run()
