"""What can be wrong before a guest runs."""

from hive_common.kernel.errors import InvalidArgument


class InvalidModule(InvalidArgument):
    """The program can never run: not WebAssembly, not of a world we serve, or beyond a limit of compilation."""


class StaleModule(Exception):
    """A compiled module does not fit this engine or processor; compiling it again helps."""
