"""hubpeer: a hub on a NATS bus that turns questions into plans and documents into records."""

__version__ = "0.1.0"
