"""Job and task state machines, placement, leases, dispatch."""
