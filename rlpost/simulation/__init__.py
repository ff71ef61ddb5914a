"""Rollouts without a model: engines with a virtual clock, and strategies compared on recorded lengths."""
