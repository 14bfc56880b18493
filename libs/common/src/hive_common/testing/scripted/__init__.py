"""A back end that plays numbered tokens at a fixed pace, for tests and benchmarks of model calls."""

from hive_common.testing.scripted.process import ScriptedProcess
from hive_common.testing.scripted.script import Generation, Request, Script, ScriptedModel, text_of
from hive_common.testing.scripted.server import ScriptedBackEnd

__all__ = ["Generation", "Request", "Script", "ScriptedBackEnd", "ScriptedModel", "ScriptedProcess", "text_of"]
