"""What a run reports about itself: metrics, trackers, rollout files, the live display, the closing table."""
