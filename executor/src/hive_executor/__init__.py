"""Runs agents in a WebAssembly sandbox on a device."""
