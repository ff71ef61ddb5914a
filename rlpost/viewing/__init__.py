"""Readers of finished and running runs: reports, lists, a live view. Never write into a run."""
