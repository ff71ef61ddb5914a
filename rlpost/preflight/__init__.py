"""Everything that can be known of a run before a device is touched; imports neither torch nor an engine."""
