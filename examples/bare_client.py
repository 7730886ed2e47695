"""No SDK: a question with nats-py and JSON alone. Any NATS client in any language can do the same."""

import asyncio
import json
import os

import nats

URL = os.environ.get("HUBPEER_NATS__URL", "nats://127.0.0.1:4222")


async def main() -> None:
    nc = await nats.connect(URL)
    query = {"query": "Which campaign brought the best return?"}
    reply = await nc.request("hub.route.finance", json.dumps(query).encode(), timeout=15)
    answer = json.loads(reply.data)
    if answer["status"] == "error":
        print(answer["error"]["code"], answer["error"]["message"])
    else:
        decision = answer["routing_decision"]
        print(decision["workflow_type"], [step["agent"] for step in decision["agents"]], decision["plan_id"])
    await nc.close()


asyncio.run(main())
