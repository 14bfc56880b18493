"""What the user of `hive up` asked for this time, as it travels to a detached supervisor. No secrets."""

import msgspec
from hive_common.contracts.events import Tier
from hive_common.inference.config import BackEndConfig


class Wishes(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """None is as last time.

    Attributes:
        executors: how many run.
        public: address under which other machines connect; empty for none.
        ollama_without_key: programs of this machine may use the Ollama paths without the key.
        model_urls: where servers of models may answer.
        counts_only: the log keeps no prompt and no answer.
        small_model: a small real model is served on this machine.
        tier: class of this machine.
        labels: for placement, besides those that are kept; empty values take labels away.
    """

    executors: int | None = None
    public: str | None = None
    ollama_without_key: bool | None = None
    model_urls: tuple[str | BackEndConfig, ...] | None = None
    counts_only: bool | None = None
    small_model: bool | None = None
    tier: Tier | None = None
    labels: dict[str, str] | None = None
