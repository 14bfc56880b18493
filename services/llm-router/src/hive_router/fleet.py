"""All back ends as the router knows them at this moment, with an index by model."""

from collections.abc import Iterator

from hive_common.contracts.events import Model

from hive_router.domain.selection import BackEnd, aliases, model_of


class Fleet:
    """Back ends by id. What runs there, its latency and its breaker outlive a change of what is known."""

    def __init__(self) -> None:
        self._back_ends: dict[str, BackEnd] = {}
        self._by_model: dict[str, list[BackEnd]] = {}

    def __iter__(self) -> Iterator[BackEnd]:
        return iter(self._back_ends.values())

    def get(self, backend_id: str) -> BackEnd | None:
        """Return a back end, or None."""
        return self._back_ends.get(backend_id)

    def put(self, *back_ends: BackEnd) -> None:
        """Add back ends, or what is new about them."""
        for new in back_ends:
            known = self._back_ends.get(new.id)
            if known is None:
                self._back_ends[new.id] = new
                continue
            # The same object stays: calls that run hold it.
            known.name, known.owner, known.models = new.name, new.owner, new.models
            known.region, known.power, known.online = new.region, new.power, new.online
            known.drained, known.revoked = new.drained, new.revoked
        self._index()

    def keep(self, ids: set[str]) -> None:
        """Forget all devices of the pool but these."""
        gone = [
            key for key, one in self._back_ends.items() if not one.is_host and not one.provider and key not in ids
        ]
        for key in gone:
            self._back_ends.pop(key).online = False
        if gone:
            self._index()

    def serving(self, model: str) -> list[BackEnd]:
        """Return the back ends that have a model."""
        return self._by_model.get(model, [])

    def others(self, model: str, limit: int) -> list[BackEnd]:
        """Return some back ends that do not have it."""
        found: list[BackEnd] = []
        for backend in self._back_ends.values():
            if len(found) == limit:
                break
            if model_of(backend, model) is None:
                found.append(backend)
        return found

    def names(self) -> list[str]:
        """Return the models that are known, present or not."""
        return sorted({name for one in self._back_ends.values() if not one.revoked for name in one.models})

    def offered(self) -> dict[str, list[tuple[BackEnd, Model]]]:
        """Return what can be called now: models, each with the back ends that have it."""
        found: dict[str, list[tuple[BackEnd, Model]]] = {}
        for backend in self._back_ends.values():
            if backend.online and not backend.revoked:
                for name, model in backend.models.items():
                    found.setdefault(name, []).append((backend, model))
        return found

    def _index(self) -> None:
        index: dict[str, list[BackEnd]] = {}
        for backend in self._back_ends.values():
            for name in backend.models:
                index.setdefault(name, []).append(backend)
                for alias in aliases(name):
                    if alias not in backend.models:
                        index.setdefault(alias, []).append(backend)
        self._by_model = index
