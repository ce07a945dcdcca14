"""The acknowledgements file: read, refused with line and mend, written so that it is read again."""

from __future__ import annotations

import os
from datetime import date
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import SettingsError
from attnbench.history.acknowledge import (
    ACCEPTABLE,
    Acknowledgement,
    AlarmKind,
    append_entry,
    entry_text,
    load_acknowledgements,
    parse_acknowledgements,
    quoted,
)
from attnbench.store.record import Status
from tests.history.fake import HOSTILE

TODAY = date(2026, 11, 21)
GOOD = """
[[known]]
kind = "slower"
backend = "CPU_ATTN"
workload = "16q1s4k*"
up_to = 1.08
since = "20261119T020000Z"
reason = "bounds checks of torch 2.13"
by = "A. Person"
expires = 2026-12-31
"""


def read(text: str) -> tuple[Acknowledgement, ...]:
    return parse_acknowledgements(text.encode(), "acknowledged.toml", TODAY)


def test_no_file_is_no_entry_and_an_empty_one_neither(tmp_path: Path) -> None:
    assert load_acknowledgements(tmp_path / "acknowledged.toml", TODAY) == ()
    assert read("# nothing yet\n") == ()


def test_an_entry_is_read() -> None:
    (entry,) = read(GOOD)
    assert entry == Acknowledgement(
        kind=AlarmKind.SLOWER,
        patterns={"backend": "CPU_ATTN", "workload": "16q1s4k*"},
        up_to=1.08,
        since="20261119T020000Z",
        reason="bounds checks of torch 2.13",
        by="A. Person",
        expires=date(2026, 12, 31),
    )
    assert entry.place == "acknowledged.toml, line 2"
    assert entry.holds(date(2026, 12, 31))
    assert not entry.holds(date(2027, 1, 1))


@pytest.mark.parametrize(
    ("old", "new", "line", "parts"),
    [
        ("[[known]]", "[known]", 0, ["both brackets"]),
        ("[[known]]", "[[knwon]]", 2, ["'knwon' is not known", "[[known]]"]),
        ('kind = "slower"', 'kind = "slow"', 3, ["'slow'", "slower, status, missing, stale"]),
        ('kind = "slower"\n', "", 2, ["kind is missing", "slower, status"]),
        ("up_to = 1.08", "up_to = 0.9", 6, ["0.9", "a ratio above 1", "up_to = 1.08"]),
        ("up_to = 1.08", "up_to = true", 6, ["a ratio above 1"]),
        ("up_to = 1.08", "up_to = nan", 6, ["a ratio above 1"]),
        ("up_to = 1.08\n", "", 2, ["up_to is missing", "up_to = 1.08"]),
        ('kind = "slower"', 'kind = "stale"', 6, ["says nothing of kind 'stale'", "leave it out"]),
        ("expires = 2026-12-31", 'expires = "soon"', 10, ["'soon' is not a day", "without quotes"]),
        ("expires = 2026-12-31\n", "", 2, ["expires is missing", "expires = 2026-12-31"]),
        ("expires = 2026-12-31", "expires = 2027-05-21", 10, ["more than 180 days", "2027-05-20"]),
        ('by = "A. Person"\n', "", 2, ["by is missing"]),
        ('by = "A. Person"', 'by = " "', 9, ["is not a text"]),
        ('reason = "bounds', 'reson = "bounds', 8, ["unknown key 'reson'", "'reason'"]),
        ('since = "20261119T020000Z"', "since = 5", 7, ["neither a run, a commit"]),
        ('since = "20261119T020000Z"', 'since = ""', 7, ["neither a run, a commit"]),
        ('"CPU_ATTN"\nworkload = "16q1s4k*"', '"*"', 2, ["every point", "name a series, backend"]),
        ('backend = "CPU_ATTN"', "backend = 3", 4, ["backend = 3 is not a text"]),
        ("up_to = 1.08", "up_to = @", 0, ["not valid TOML", "line 6"]),
        ("expires = 2026-12-31", "expires = 2026-13-31", 0, ["not valid TOML"]),
    ],
)
def test_a_wrong_file_names_the_line_and_the_mend(
    old: str, new: str, line: int, parts: list[str]
) -> None:
    assert old in GOOD
    with pytest.raises(SettingsError) as caught:
        read(GOOD.replace(old, new))
    message = str(caught.value)
    assert int(caught.value.exit_code) == 2
    assert "\n" not in message
    if line:
        assert message.startswith(f"acknowledged.toml, line {line}: "), message
    for part in parts:
        assert part in message, message


def test_the_second_entry_has_its_own_lines() -> None:
    with pytest.raises(SettingsError, match=r"acknowledged\.toml, line 16: up_to = -1"):
        read(GOOD + GOOD.replace("1.08", "-1"))
    # A header within a text of several lines is none: the entry is named by its number.
    with pytest.raises(SettingsError, match=r"acknowledged\.toml, entry 1: up_to = -1"):
        read(GOOD.replace("1.08", "-1").replace('"A. Person"', '"""\n[[known]]\n"""'))


def test_a_wrong_output_is_never_accepted() -> None:
    text = GOOD.replace('"slower"', '"status"').replace("up_to = 1.08", "statuses = [{}]")
    assert read(text.replace("{}", '"CRASH", "OOM"'))[0].statuses == (Status.CRASH, Status.OOM)
    with pytest.raises(SettingsError, match=r"line 6: a wrong output is never accepted"):
        read(text.replace("{}", '"CRASH", "INCORRECT"'))
    with pytest.raises(SettingsError, match=r"'OK' is no status to accept; use UNSUPPORTED"):
        read(text.replace("{}", '"OK"'))
    with pytest.raises(SettingsError, match="is not a list"):
        read(text.replace("{}", "").replace("[]", '"CRASH"'))


def test_bytes_that_are_no_text_name_the_line() -> None:
    with pytest.raises(SettingsError, match="line 3: not UTF-8"):
        parse_acknowledgements(b"\n\n\xff", "acknowledged.toml", TODAY)


FIELDS = {
    "series": "0123456789abcdef",
    "point": "fedcba9876543210",
    "title": "FLASH_ATTN[fa3] 16q1s4k dtype=fp16",
    "backend": "FLASH_ATTN",
    "variant": "fa3",
    "phase": "decode",
    "workload": "16q1s4k dtype=fp16",
    "shape": "llama-3-8b",
    "device": "nvidia-h200",
    "metric": "attention",
}


@pytest.mark.parametrize(
    ("patterns", "expected"),
    [
        ({"series": "0123456789abcdef"}, True),
        ({"series": "01234567"}, True),
        ({"series": "0123456"}, False),
        ({"series": "fedcba98"}, True),
        ({"series": "FLASH_ATTN[fa3] 16q1s4k *"}, True),
        ({"series": "FLASH_ATTN[fa2] 16q1s4k *"}, False),
        ({"series": "FLASH_ATTN[fa3] 16q1s4k"}, False),
        ({"backend": "FLASH_*"}, True),
        ({"backend": "flash_*"}, False),
        ({"backend": "FLASH_ATTN", "phase": "prefill"}, False),
        ({"workload": "??q1s4k*", "device": "nvidia-*", "shape": "llama*"}, True),
        ({"variant": "fa[23]", "backend": "*"}, False),
    ],
)
def test_patterns(patterns: dict[str, str], expected: bool) -> None:
    entry = Acknowledgement(
        kind=AlarmKind.STALE,
        patterns=patterns,
        since="2026-11-20",
        reason="r",
        by="b",
        expires=TODAY,
    )
    assert entry.matches(FIELDS) is expected


HOSTILE_TEXTS = (
    HOSTILE,
    '"""\n[[known]]\nkind = "slower"',
    "ends in a backslash \\",
    "\x1b[31mred\x1b[0m \x00 \x7f",
    "\u202eright to left",
    "half \udcff of a pair",
    "\U0001f600\u2028\u0085",
)


@pytest.mark.parametrize("text", HOSTILE_TEXTS)
def test_a_hostile_text_is_quoted_so_that_it_is_read_again(tmp_path: Path, text: str) -> None:
    path = tmp_path / "acknowledged.toml"
    path.write_text(GOOD.rstrip("\n"), encoding="utf-8")
    entry = Acknowledgement(
        kind=AlarmKind.STATUS,
        patterns={"series": text},
        statuses=(Status.UNSUPPORTED,),
        since="2026-11-20",
        reason=text,
        by=text,
        expires=date(2026, 12, 1),
    )
    append_entry(path, entry, TODAY)
    first, second = load_acknowledgements(path, TODAY)
    assert first == read(GOOD)[0]
    expected = text.replace("\udcff", "\N{REPLACEMENT CHARACTER}")
    assert (second.reason, second.by, second.patterns["series"]) == (expected,) * 3
    own = entry_text(entry)
    assert all(c.isprintable() or c == "\n" for c in own)
    assert own.count("\n") == 8
    assert sorted(os.listdir(tmp_path)) == ["acknowledged.toml"]


@settings(deadline=None, max_examples=200)
@given(
    st.text(alphabet=st.characters(exclude_categories=["Cs"]), min_size=1).filter(str.strip),
    st.sampled_from(AlarmKind),
    st.floats(1.0001, 999),
    st.lists(st.sampled_from(ACCEPTABLE), min_size=1),
    st.dates(date(2026, 1, 1), date(2027, 5, 20)),
)
def test_what_is_written_is_read_again(
    text: str, kind: AlarmKind, up_to: float, statuses: list[Status], expires: date
) -> None:
    entry = Acknowledgement(
        kind=kind,
        patterns={"backend": "CPU_ATTN", "workload": text},
        since="20261119T020000Z-00000a",
        reason=text,
        by=text,
        expires=expires,
        up_to=up_to if kind is AlarmKind.SLOWER else 0.0,
        statuses=tuple(statuses) if kind is AlarmKind.STATUS else (),
    )
    assert read(entry_text(entry)) == (entry,)


def test_a_file_that_is_wrong_is_not_added_to(tmp_path: Path) -> None:
    path = tmp_path / "acknowledged.toml"
    path.write_text("[[known]]\n", encoding="utf-8")
    with pytest.raises(SettingsError, match="line 1: kind is missing"):
        append_entry(path, read(GOOD)[0], TODAY)
    assert path.read_text(encoding="utf-8") == "[[known]]\n"


def test_a_link_stays_a_link(tmp_path: Path) -> None:
    real = tmp_path / "real.toml"
    real.write_text("# kept\n", encoding="utf-8")
    (tmp_path / "acknowledged.toml").symlink_to(real)
    append_entry(tmp_path / "acknowledged.toml", read(GOOD)[0], TODAY)
    assert (tmp_path / "acknowledged.toml").is_symlink()
    assert real.read_text(encoding="utf-8").startswith("# kept\n\n[[known]]\n")


def test_quoted_is_ascii_free_of_control_characters() -> None:
    assert quoted('a"b\\c\n\t\x07') == '"a\\"b\\\\c\\n\\t\\u0007"'
