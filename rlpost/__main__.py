"""``python -m rlpost``: the same as the ``rlpost`` command."""

import sys

from rlpost.cli import main

if __name__ == "__main__":
    sys.exit(main())
