"""Submits that wait together for one call."""

import asyncio
from types import SimpleNamespace
from typing import Any, cast

import pytest
from hive_gateway.intake import Intake
from hive_gateway.keys import Caller
from hive_gateway.peers import Peers
from hive_proto.jobs.v1 import jobs_pb2

CALLER = Caller("owner", "admin", "somebody")


class BrokenScheduler:
    """Fails with what no catalogue has."""

    async def ask(self, *_: Any) -> jobs_pb2.SubmitManyResponse:
        raise ValueError("a defect of ours")


async def test_a_defect_reaches_every_waiting_caller_as_what_it_is() -> None:
    peers = SimpleNamespace(scheduler=BrokenScheduler(), intake=SimpleNamespace(SubmitMany=None))
    intake = Intake(cast(Peers, peers))
    calls = [intake.submit(jobs_pb2.SubmitRequest(document_json=b"{}"), CALLER) for _ in range(3)]
    outcomes = await asyncio.gather(*calls, return_exceptions=True)
    assert [type(outcome) for outcome in outcomes] == [ValueError] * 3
    with pytest.raises(ValueError, match="a defect"):
        await intake.submit(jobs_pb2.SubmitRequest(document_json=b"{}"), CALLER)
