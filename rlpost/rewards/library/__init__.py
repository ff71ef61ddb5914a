"""The rewards that ship with rlpost. ``rlpost.rewards`` lists them."""
