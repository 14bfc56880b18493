"""gRPC: servers with a key and one mapping of errors, and channels that carry both."""
