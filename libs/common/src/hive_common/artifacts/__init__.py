"""Agents as files: the manifest, the OCI artifact it is packed into, and the store that keeps the blobs."""
