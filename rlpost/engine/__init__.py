"""Inference engines: the protocol that rollouts drive, vLLM behind it, and many replicas as one."""
