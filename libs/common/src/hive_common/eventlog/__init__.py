"""The event log: one hash chain in Postgres, its writer, its readers, and projections of it."""
