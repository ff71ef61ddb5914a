"""``rlpost doctor``: what a machine has, what is wrong with it, and what to type."""
