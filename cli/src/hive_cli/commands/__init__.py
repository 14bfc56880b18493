"""The commands of `hive` that talk to a running installation."""
