"""Agents as OCI artifacts: manifest, package, and the store that keeps blobs by digest."""
