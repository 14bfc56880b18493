"""The Python that is built into the shared CPython component. It runs in the guest and is never imported here."""
