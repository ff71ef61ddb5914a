"""The rewards that ship with rlpost. ``rlpost.rewards`` names them."""
