"""rlpost: RL post-training of language models with active partial rollouts. Importing this starts nothing."""

__version__ = "0.2.0"
