"""What the hub keeps on the bus: its streams, consumers and buckets, as explicit JSON configuration."""

from __future__ import annotations

from typing import Any, Final

from hubpeer.bus.jetstream import NS, Bucket, Difference, JetStream
from hubpeer.settings import GiB, MiB, Settings

PLANS: Final = "PLANS"
RESULTS: Final = "RESULTS"
OUTCOMES: Final = "OUTCOMES"
DOCS: Final = "DOCS"
RECEIPTS: Final = "RECEIPTS"
DLQ: Final = "DLQ"
STREAMS: Final = (PLANS, RESULTS, OUTCOMES, DOCS, RECEIPTS, DLQ)

AGENTS_BUCKET: Final = "HUB_AGENTS"
PLANS_BUCKET: Final = "HUB_PLANS"

RESULTS_CONSUMER: Final = "hub"
DOCS_CONSUMER: Final = "ingest"


def streams(settings: Settings) -> list[dict[str, Any]]:
    """Every stream of the contract."""
    kept = settings.plans.keep_h * 3600 * NS
    common = {"storage": "file", "num_replicas": settings.nats.replicas, "allow_direct": True}
    limits = {**common, "retention": "limits", "discard": "old"}
    return [
        # One message per subject: a step is published once, and its subject names it. Kept after it was taken, so that
        # `nats stream view` shows what was asked of whom.
        {
            **limits, "name": PLANS, "subjects": ["hub.plan.*.*.*"], "max_age": kept, "max_msgs_per_subject": 1,
            "max_bytes": 1 * GiB, "allow_atomic": True, "allow_msg_ttl": True, "duplicate_window": 600 * NS,
        },
        {
            **limits, "name": RESULTS, "subjects": ["hub.result.*.*.*"], "max_age": kept, "max_msgs_per_subject": 64,
            "max_bytes": 1 * GiB, "duplicate_window": 120 * NS,
        },
        {
            **limits, "name": OUTCOMES, "subjects": ["hub.outcome.*.*"], "max_age": kept, "max_msgs_per_subject": 1,
            "max_bytes": 1 * GiB, "duplicate_window": 120 * NS,
        },
        # A work queue: what is acknowledged is gone, what does not fit is refused to its publisher, and one client's backlog
        # does not take another's room. The duplicate window is the shortest the server takes: it spans all clients, so with
        # a long one a client could swallow another's documents by using its message ids first (docs/adr/0003).
        {
            **common, "name": DOCS, "subjects": ["hub.docs.stream.*"], "retention": "workqueue", "discard": "new",
            "max_bytes": settings.documents.stream_bytes, "max_msgs_per_subject": settings.documents.stream_per_client,
            "discard_new_per_subject": True, "duplicate_window": NS // 10,
        },
        {
            **limits, "name": RECEIPTS, "subjects": ["hub.docs.receipt.*.*"], "max_age": 30 * 24 * 3600 * NS,
            "max_msgs_per_subject": 8, "max_bytes": 1 * GiB, "duplicate_window": 120 * NS,
        },
        {
            **limits, "name": DLQ, "subjects": ["hub.dlq.*.*"], "max_age": 30 * 24 * 3600 * NS, "max_bytes": 512 * MiB,
            "duplicate_window": 120 * NS,
        },
    ]  # fmt: skip


def results_consumer() -> dict[str, Any]:
    return {
        "durable_name": RESULTS_CONSUMER, "filter_subject": "hub.result.*.*.*", "ack_policy": "explicit",
        "deliver_policy": "all", "ack_wait": 30 * NS, "max_ack_pending": 256,
    }  # fmt: skip


def docs_consumer(settings: Settings) -> dict[str, Any]:
    """Deliveries are counted but not limited by the server, which would leave the message lying unacknowledged in a work
    queue; the hub itself moves it to the DLQ after `documents.max_deliver`. Documents handed back for later count as pending:
    those of one client must not use up what all may have."""
    return {
        "durable_name": DOCS_CONSUMER, "filter_subject": "hub.docs.stream.*", "ack_policy": "explicit",
        "deliver_policy": "all", "ack_wait": 30 * NS, "max_ack_pending": 1000,
    }  # fmt: skip


def agent_consumer(agent: str, settings: Settings) -> dict[str, Any]:
    """The pull consumer an agent takes its steps from; made by the hub, so that agents need no right to make any."""
    return {
        "durable_name": agent, "filter_subject": f"hub.plan.{agent}.*.*", "ack_policy": "explicit",
        "deliver_policy": "all", "ack_wait": int(settings.plans.ack_wait_s * NS),
        "max_deliver": settings.plans.max_deliver, "max_ack_pending": 64,
    }  # fmt: skip


async def ensure(js: JetStream, settings: Settings) -> list[Difference]:
    """Make or compare everything but the agents' consumers. Raises `SettingsError` where a stream is not ours to use."""
    found: list[Difference] = []
    for config in streams(settings):
        found += await js.ensure_stream(config)
    replicas = settings.nats.replicas
    found += await js.ensure_stream(Bucket(js, AGENTS_BUCKET).config(history=1, replicas=replicas))
    found += await js.ensure_stream(
        Bucket(js, PLANS_BUCKET).config(max_age_s=settings.plans.keep_h * 3600, history=1, replicas=replicas)
    )
    found += await js.ensure_consumer(RESULTS, results_consumer())
    found += await js.ensure_consumer(DOCS, docs_consumer(settings))
    return found
