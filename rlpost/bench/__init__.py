"""Benchmarks a user can run: ``rlpost bench``. Called by ``cli``; nothing of a training run imports it."""
