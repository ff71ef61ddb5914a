"""``rlpost sft``: supervised fine-tuning on the trainer that RL uses. ``sft.loop`` is the whole of it on one screen."""
