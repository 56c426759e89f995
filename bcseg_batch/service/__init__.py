"""The only place with threads, queues and signals."""
