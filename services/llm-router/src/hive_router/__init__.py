"""Model calls: to a back end of this host, to a device of the pool, and why they go there."""
