"""Capability tokens: minting, narrowing and verifying one, beside the bare signatures of the same kind.

`python -m benchmarks.tokens` prints milliseconds: the median of each round, with their spread.
"""

import asyncio
import statistics
import time
from collections.abc import Callable
from typing import Any

from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from hive_common.contracts.permissions import (
    ForkPermission,
    HttpPermission,
    KvPermission,
    ModelPermission,
    Permissions,
)
from hive_common.permissions.tokens import Claims, Minter, Verifier, new_key, public_key

from benchmarks.rounds import spread

ROUNDS = 20
TOKENS_PER_ROUND = 100
FAR_US = 1 << 60
ALL = Permissions(
    model=ModelPermission(("small", "large"), 4_096, "pool"),
    http=HttpPermission(("api.example.org", "*.example.net"), ("GET", "POST")),
    kv=KvPermission("notes", 1 << 20),
    fork=ForkPermission(("square", "cube@1.0.0"), 10, 2),
    scratch_bytes=64 << 20,
)
LESS = Permissions(model=ModelPermission(("small",), 100, "own-devices"), kv=KvPermission("notes", 1 << 10))


def _round(calls: list[Callable[[], Any]]) -> tuple[float, list[Any]]:
    samples, results = [], []
    for call in calls:
        started = time.perf_counter()
        results.append(call())
        samples.append((time.perf_counter() - started) * 1000)
    return statistics.median(samples), results


async def run() -> dict[str, Any]:
    """Measure on this machine, now."""
    root = new_key()
    minter, verifier = Minter(root), Verifier(public_key(root))
    bare = Ed25519PrivateKey.generate()
    public = bare.public_key()
    found: dict[str, list[float]] = {}

    def measured(name: str, calls: list[Callable[[], Any]]) -> list[Any]:
        median, results = _round(calls)
        found.setdefault(name, []).append(median)
        return results

    def claims(attempt: int) -> Claims:
        return Claims(
            executor="e", key="U" * 56, job="j", task="t", attempt=attempt, permissions=ALL, expires_us=FAR_US
        )

    for _ in range(ROUNDS):
        attempts = range(TOKENS_PER_ROUND)
        minted = measured("mint_ms", [lambda one=one: minter.mint(claims(one)) for one in attempts])
        narrowed = measured(
            "narrow_ms", [lambda token=token: verifier.narrow(token, LESS, FAR_US) for token in minted]
        )

        def verify(token: str) -> Claims:
            return verifier.verify(token, executor="e", now_us=1)

        # Each of them for the first time; then as at the second call of an attempt.
        seen = measured("verify_ms", [lambda token=token: verify(token) for token in narrowed])
        assert all(one.permissions.kv == LESS.kv for one in seen)
        measured("verify_again_ms", [lambda token=token: verify(token) for token in narrowed])
        signatures = measured("bare_sign_ms", [lambda token=token: bare.sign(token.encode()) for token in minted])
        measured(
            "bare_verify_ms",
            [
                lambda pair=pair: public.verify(pair[0], pair[1].encode())
                for pair in zip(signatures, minted, strict=True)
            ],
        )
    return {
        **{name: spread(values, 3) for name, values in found.items()},
        "token_characters": len(minted[0]),
        "tokens_each": ROUNDS * TOKENS_PER_ROUND,
    }


if __name__ == "__main__":
    for name, value in asyncio.run(run()).items():
        print(f"{name:>18}  {value}")
