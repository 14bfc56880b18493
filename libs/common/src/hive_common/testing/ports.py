"""Which methods of a port can be lost on their way: a table of cases is held against the port itself."""

import inspect


def calls_of(port: type) -> set[str]:
    """Return the public methods of `port` that await something: coroutines, asynchronous generators, streams."""
    return {
        name
        for name, found in inspect.getmembers(port, callable)
        if not name.startswith("_") and (inspect.iscoroutinefunction(found) or inspect.isasyncgenfunction(found))
    }
