"""Rollouts: the buffer, its ledger and schedule, and ``collect``, the loop over the engine (synchronous and APRIL)."""
