"""``rlpost report``: run directories in, one self-contained HTML file out. Only reads files; a run may be active."""
