"""The ``rlpost`` command: arguments, help texts, and the reference pages generated from them."""

from rlpost.cli.commands import main

__all__ = ["main"]
