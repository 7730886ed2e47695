"""Ask a question and wait for what the agents found out: python examples/ask.py "which campaign paid off?" """

import asyncio
import os
import sys

from hubpeer.client import Client

URL = os.environ.get("HUBPEER_NATS__URL", "nats://127.0.0.1:4222")


async def main(query: str) -> None:
    async with Client(URL, agent="ceo") as hub:
        decision = await hub.route(query)
        print("plan:", " -> ".join(step.agent for step in decision.agents), f"({decision.routing_method})")
        outcome = await hub.outcome(decision.plan_id, timeout_s=60)
    for step in outcome.steps:
        print(f"{step.agent}: {step.status} {step.result}")


asyncio.run(main(sys.argv[1] if len(sys.argv) > 1 else "what does the budget look like?"))
