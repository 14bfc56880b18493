"""The `hive` command and the supervisor of an embedded installation."""
