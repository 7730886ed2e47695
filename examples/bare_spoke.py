"""No SDK: register, take one step with a JetStream pull, report, acknowledge. Runs until it has done one step."""

import asyncio
import json
import os

import nats

URL = os.environ.get("HUBPEER_NATS__URL", "nats://127.0.0.1:4222")


async def main() -> None:
    nc = await nats.connect(URL)
    js = nc.jetstream()
    card = {"capabilities": ["campaign_analysis"], "specialties": ["digital_marketing"]}
    reply = await nc.request("hub.agents.register.marketing", json.dumps(card).encode(), timeout=5)
    where = json.loads(reply.data)  # names the stream and the durable consumer the hub made for us
    steps = await js.pull_subscribe_bind(where["consumer"], where["stream"])
    print("ready", flush=True)
    while True:
        try:
            [step] = await steps.fetch(1, timeout=5)
            break
        except nats.errors.TimeoutError:
            await nc.request("hub.agents.heartbeat.marketing", b"", timeout=5)
    work = json.loads(step.data)
    print("step", work["step_id"], "of", work["plan_id"], ":", work["task"])
    result = {"status": "done", "result": {"campaign": "spring"}, "verdict": "approve"}
    # Report first, acknowledge then: a crash in between only means doing it again.
    await js.publish(f"hub.result.marketing.{work['plan_id']}.{work['step_id']}", json.dumps(result).encode())
    await step.ack()
    await nc.close()


asyncio.run(main())
