"""``rlpost report``: run directories in, one self-contained HTML file out. Reads files only; a run may be going on."""
