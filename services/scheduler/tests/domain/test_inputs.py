"""What a job gives its tasks, checked before anything runs."""

import msgspec
import pytest
from hive_common.contracts import values
from hive_common.contracts.events import AgentRef, JobSubmitted
from hive_common.contracts.limits import TASK_INPUT_BYTES_MAX
from hive_common.kernel.errors import InvalidArgument
from hive_scheduler.domain.inputs import Evaluator, check_static
from hive_scheduler.domain.job import JobState
from hive_scheduler.domain.jobfile import parse_job
from hive_scheduler.domain.schemas import Schemas


def test_a_task_whose_input_is_too_large_for_a_guest_is_refused_before_it_is_stored():
    document = msgspec.json.encode(
        {
            "apiVersion": "hive/v1",
            "kind": "Job",
            "name": "large",
            "tasks": [{"id": "a", "agent": "a@1.0.0", "fork": "${input}", "input": {"x": "${item}"}}],
        }
    )
    given = values.inline(values.encode_json(["small", "x" * TASK_INPUT_BYTES_MAX]))
    submitted = JobSubmitted(
        name="large",
        document=msgspec.Raw(document),
        input=given,
        agents={"a@1.0.0": AgentRef("a", "1.0.0", "sha256:0", "python", 1, 1_000, 1)},
        request_digest="",
        deadline_us=1,
    )
    job = JobState("job", "owner", submitted, parse_job(document))
    with pytest.raises(InvalidArgument, match=r"tasks\[0\]\.input \(element 1 of the fork\): has 67108872 bytes"):
        check_static(job, Evaluator(Schemas(), {}, frozenset()))
