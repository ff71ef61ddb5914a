"""Rollouts: ``collect`` (synchronous, APRIL, evaluation), the buffer with its schedule and accounts, and the ledger."""
