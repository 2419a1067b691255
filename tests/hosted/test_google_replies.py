"""Google's operations, as its service sends them."""

from __future__ import annotations

import json
from typing import Any

import pytest

from reverie_jax.hosted.interface import BatchStatus
from reverie_jax.hosted.providers.google_replies import read_operation

FULL = "Enqueued token limit reached."
OUTPUT, DONE = {"responsesFile": "files/out"}, {"done": True}
INLINED = {
    "inlinedResponses": {"inlinedResponses": [{"metadata": {"key": "k"}, "response": {"a": 1}}, {"response": {}}]}
}
FAILED = {"code": 13, "message": "Half of it\nis missing, says {key}."}
OPERATIONS: list[tuple[dict[str, Any], BatchStatus]] = [
    ({"metadata": {"state": "BATCH_STATE_RUNNING"}}, BatchStatus(False)),
    ({"metadata": {"state": "BATCH_STATE_NEW"}, "done": False}, BatchStatus(False)),
    ({}, BatchStatus(False)),
    ({"metadata": None, "response": [], "error": None}, BatchStatus(False)),
    (
        {"metadata": {"state": "JOB_STATE_PARTIALLY_SUCCEEDED", "output": OUTPUT}, "response": OUTPUT, **DONE},
        BatchStatus(True, "the batch is partially succeeded", ("files/out",)),
    ),
    ({"metadata": {"state": "BATCH_STATE_SUCCEEDED"}, "response": OUTPUT}, BatchStatus(True, "", ("files/out",))),
    ({"metadata": {"state": "BATCH_STATE_NEW"}, **DONE}, BatchStatus(True, "the batch is new")),
    ({"metadata": {"endTime": "2026-01-01T00:00:00Z"}}, BatchStatus(True, "the batch is done")),
    (
        {"metadata": {"state": "BATCH_STATE_FAILED", "output": OUTPUT}, "error": FAILED, **DONE},
        BatchStatus(True, "the batch is failed: Half of it is missing, says ***.", ("files/out",)),
    ),
    (
        {"metadata": {"state": "BATCH_STATE_FAILED", "error": {"code": 8, "message": FULL}}, **DONE},
        BatchStatus(True, f"the batch is failed: {FULL}", full=True),
    ),
    (
        {"error": {"code": 7, "message": "Your project is suspended."}, **DONE},
        BatchStatus(True, "the batch is done: Your project is suspended.", denied=True),
    ),
    (
        {"metadata": {"state": "BATCH_STATE_CANCELLED", "output": INLINED}, "error": {"code": 1, "message": "Stop."}},
        BatchStatus(
            True,
            "the batch is cancelled: Stop.",
            lines=b'{"metadata": {"key": "k"}, "response": {"a": 1}, "key": "k"}',
        ),
    ),
]


@pytest.mark.parametrize(("operation", "status"), OPERATIONS)
def test_every_end_of_geminis_operations_is_read(operation, status):
    """Its SDK reads neither an operation's error, nor its response, nor whether it is done."""
    told = json.loads(json.dumps(operation).replace("{key}", "SECRET-KEY-123"))
    assert read_operation(told, "gemini:m", "SECRET-KEY-123") == status
