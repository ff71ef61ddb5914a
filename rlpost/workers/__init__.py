"""Workers: a trainer and an engine that share a device, in this process or on a cluster."""
