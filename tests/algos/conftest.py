"""Hypothesis without a deadline: the machines that run the tests are shared, and the first torch call is slow."""

from hypothesis import settings

settings.register_profile("rlpost", deadline=None)
settings.load_profile("rlpost")
