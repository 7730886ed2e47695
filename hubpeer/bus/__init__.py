"""The bus: connections, streams, the micro service, the embedded server. The only importer of nats-py."""

from nats.aio.msg import Msg

__all__ = ["Msg"]
