"""What a run must not lose, and how it is restored: checkpoints, the run directory, stop requests, history."""
