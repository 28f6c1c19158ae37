"""The only module that imports the Kafka client."""

from __future__ import annotations

from vista.errors import MissingDependencyError
from vista.install_command import install_command

try:
    from confluent_kafka import (
        TIMESTAMP_NOT_AVAILABLE,
        Consumer,
        IsolationLevel,
        KafkaError,
        KafkaException,
        Message,
        TopicPartition,
    )
    from confluent_kafka.admin import AdminClient, OffsetSpec
except ImportError as error:
    raise MissingDependencyError(
        f"source=kafka://... needs the Kafka client ({error}); install it with: {install_command('kafka')}"
    ) from error

__all__ = [
    "TIMESTAMP_NOT_AVAILABLE",
    "AdminClient",
    "Consumer",
    "IsolationLevel",
    "KafkaError",
    "KafkaException",
    "Message",
    "OffsetSpec",
    "TopicPartition",
]
