"""What crosses a boundary as JSON, defined once: event payloads, NATS messages, values, agent manifests.

gRPC shapes stand in `proto/`; everything here is versioned by addition.
"""
