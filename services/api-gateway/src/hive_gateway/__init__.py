"""REST, SSE and public gRPC."""
