"""The bus: connections, streams, the micro service, the embedded server. The only importer of nats-py."""
