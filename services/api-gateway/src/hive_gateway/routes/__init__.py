"""The REST paths, one module to an area. Each has a function that builds its router from what it needs."""
