"""What the tests of `reverie eval` and its like share."""

from __future__ import annotations

import json

MODEL = ("eval", "--model", "scenes-base")


def assert_refused(result, *facts):
    """Check exit code 2, and one line on stderr that contains the facts."""
    code, out, err = result
    assert (code, out) == (2, ""), err
    assert err.startswith("reverie: error: ")
    assert err.count("\n") == 1
    assert all(str(fact) in err for fact in facts), err


def rows(path):
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def plain(text):
    return " ".join(text.split())
