"""Everything that can be known about a run before a device is touched; imports neither torch nor an engine."""
