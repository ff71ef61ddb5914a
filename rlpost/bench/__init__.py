"""Benchmarks that users can run: ``rlpost bench``. Called by ``cli``; no training code imports it."""
