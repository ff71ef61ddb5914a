"""``python -m rlpost``: the same as the ``rlpost`` command."""

import sys

if __name__ == "__main__":
    # Python puts the caller's folder first, where a file such as datasets.py would hide a library's module.
    sys.path.append(sys.path.pop(0))

    from rlpost.cli import main

    sys.exit(main())
