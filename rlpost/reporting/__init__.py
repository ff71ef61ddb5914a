"""What a run says of itself: metrics, trackers, rollout files, the live display, the closing table."""
