"""The only public door of the control plane: REST with SSE, and gRPC."""
