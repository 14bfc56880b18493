"""Canaries over REST: texts go along byte for byte, and answers come back from nowhere."""

import msgspec
from hive_common.kernel.ids import new_id


async def test_one_is_added_listed_and_removed(world, http):
    body = {"agent": "square@1.0.0", "input": '{"n":  3}', "answer": ' {"square": 9e0}', "equal": "exact"}
    answer = await http.post("/v1/canaries", json=body)
    added = await answer.json()
    assert (answer.status, added["agent"], added["input"]) == (201, "square@1.0.0", {"n": 3})
    (asked,) = world.canaries.added
    assert (asked.input_json.decode(), asked.answer_json.decode()) == (body["input"], body["answer"])
    assert asked.equal == "exact" and asked.caller
    listed = await (await http.get("/v1/canaries", params={"agent": "square@1.0.0"})).json()
    assert [(one["canary_id"], one["agent"]) for one in listed["canaries"]] == [
        (added["canary_id"], "square@1.0.0")
    ]
    assert b"9e0" not in msgspec.json.encode([added, listed])
    gone = await http.delete(f"/v1/canaries/{added['canary_id']}")
    assert (gone.status, (await gone.json())["removed"]) == (200, True)
    assert (await http.delete(f"/v1/canaries/{new_id()}")).status == 404


async def test_another_rule_than_those_that_have_keys_is_refused(world, http):
    body = {"agent": "square@1.0.0", "input": "1", "answer": "1", "equal": "numeric"}
    assert (await http.post("/v1/canaries", json=body)).status == 400
    assert world.canaries.added == []
