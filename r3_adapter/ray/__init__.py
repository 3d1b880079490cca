"""The loop of a run on Ray: engines, ranks, the store between them, and what becomes of those that die."""
