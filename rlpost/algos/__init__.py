"""The math between rewards and the loss: pure functions in short files, chosen by name in ``table``.

Knows neither ``rollout`` nor ``train``. Importing this package imports neither torch nor any of its parts.
"""
