"""Messages of Kafka topics as a source of a log's segments (extra `kafka`)."""
