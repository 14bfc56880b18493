"""Which models the devices of the pool serve."""
