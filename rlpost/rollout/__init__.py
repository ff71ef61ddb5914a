"""Rollouts: prompts, the engine protocol and engines, the buffer, and ``collect`` (synchronous and APRIL)."""
