"""What reads finished and running runs: reports, lists, a live view. Never writes into a run."""
