"""Data files cannot break out of their script, whatever names and messages hold."""

from __future__ import annotations

import json
import math
import re
from datetime import UTC, datetime

from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.dashboard.script import data_script, to_json

json_values = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(),
    lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner),
    max_leaves=10,
)


@settings(deadline=None, max_examples=100)
@given(json_values)
def test_json_round_trips_in_plain_ascii(value: object) -> None:
    text = to_json(value)
    assert text.isascii()
    assert not set("<>&") & set(text)
    assert json.loads(text) == value


def test_script_assigns_to_one_global() -> None:
    text = data_script("runs", {"x": "</script><img src=x onerror=alert(1)>\u2028"})
    match = re.fullmatch(
        r'\(window\.attnbenchData=window\.attnbenchData\|\|\{\}\)\["runs"\]=(.*);\n', text
    )
    assert match is not None
    assert json.loads(match[1])["x"].startswith("</script>")
    assert "</" not in text


def test_numbers_keep_seven_digits_and_infinities_become_null() -> None:
    assert json.loads(to_json([math.nan, math.inf, 1 / 3, 1e-9])) == [None, None, 0.3333333, 1e-9]
    assert to_json(datetime(2026, 11, 21, 2, 0, 1, 999, UTC)) == '"2026-11-21T02:00:01+00:00"'
