"""What the router decides, without clock, network or database."""
