"""What a run must not lose, and how it comes back: checkpoints, the run directory, stop requests, export."""
