"""A saved choice, loaded as the chain of its platform, and refused elsewhere."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from attnbench.choose.table import save, to_table
from attnbench.errors import DataError, SchemaError, UsageError
from attnbench.selection import config_of, consider, resolve_device
from attnbench.selection.choices import Here, load_choices, use_choices
from attnbench.upgrade.batches import parse_batches
from attnbench.workload import Workload
from tests.choose.fake import FA3, FLASHINFER, FLEX, H200, TRITON, chosen, timed
from tests.history.fake import START

HERE = Here(H200, "580.1", ("python==3.11.0", "torch==2.13.0", "vllm==0.22.1"))
SOON = START + timedelta(days=1)
SHARES = parse_batches(["32q1s4k"])
LLAMA = config_of(Workload.parse("8q1s1k"), leave_free=True)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    advice = chosen(timed(FLASHINFER, 1e-4), timed(TRITON, 2e-4), timed(FA3, 3e-4),
                    timed(FLEX, 4e-4))  # fmt: skip
    save(advice, "llama-3-8b", SHARES, tmp_path / "choices.json")
    return tmp_path / "choices.json"


@pytest.fixture(autouse=True)
def no_choice_left() -> Iterator[None]:
    yield
    use_choices(None)


def change(path: Path, **scope: Any) -> Path:
    table = json.loads(path.read_text(encoding="utf-8"))
    table["scope"] |= scope
    path.write_text(json.dumps(table), encoding="utf-8")
    return path


def test_the_selector_takes_the_winner_then_the_others_then_the_chain(path: Path) -> None:
    sm90 = resolve_device("sm90")
    before = consider(LLAMA, sm90)
    assert before.backend == "FLASH_ATTN"
    use_choices(load_choices(path, HERE, SOON))
    after = consider(LLAMA, sm90)
    assert (after.backend, after.variant) == ("FLASHINFER", "FA3")
    listed = [one.name for one in after.candidates]
    assert listed[:4] == ["FLASHINFER", "TRITON_ATTN", "FLASH_ATTN", "FLEX_ATTENTION"]
    assert len(listed) == len(set(listed))
    assert set(listed) == {one.name for one in before.candidates}
    assert after.followed == "FLASH_ATTN"  # what vLLM takes is what it was
    assert str(path) in after.follows
    use_choices(None)
    assert consider(LLAMA, sm90) == before


@pytest.mark.parametrize(
    ("text", "device"),
    [
        ("8q1s1k", "sm100"),
        ("8q1s1k shape=llama-3-70b", "sm90"),
        ("8q1s1k kv=fp8_e4m3", "sm90"),
        ("8q1s1k window=1024", "sm90"),
        ("8q1s1k block=32", "sm90"),
        ("8q1s1k layout=HND", "sm90"),
    ],
)
def test_another_layer_or_capability_has_its_own_chain(path: Path, text: str, device: str) -> None:
    config, where = config_of(Workload.parse(text), leave_free=True), resolve_device(device)
    before = [one.name for one in consider(config, where).candidates]
    use_choices(load_choices(path, HERE, SOON))
    assert [one.name for one in consider(config, where).candidates] == before


@pytest.mark.parametrize(
    ("here", "said"),
    [
        (Here("nvidia-h100", "580.1", HERE.versions), "device class nvidia-h200, not nvidia-h100"),
        (Here(H200, "590.0", HERE.versions), "driver 580.1, not 590.0"),
        (Here(H200, "580.1", ("torch==2.14.0",)), "torch==2.13.0, and here is 2.14.0"),
        (Here(H200, "580.1", ()), "torch==2.13.0, and here is none"),
    ],
)
def test_another_machine_is_refused(path: Path, here: Here, said: str) -> None:
    with pytest.raises(DataError, match="does not hold here") as error:
        load_choices(path, here, SOON)
    assert said in str(error.value)
    assert "attnbench choose --save" in str(error.value)


@pytest.mark.parametrize(("days", "holds"), [(29.9, True), (30, False), (400, False)])
def test_it_expires(path: Path, days: float, holds: bool) -> None:
    now: datetime = START + timedelta(days=days)
    if holds:
        load_choices(path, HERE, now)
        return
    with pytest.raises(DataError, match="expired on 2026-12-09"):
        load_choices(path, HERE, now)


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "{}", '{"schema": "attnbench-choices", "version": 2}',
     '{"schema": "attnbench-choices", "version": 1}',
     '{"schema": "attnbench-choices", "version": 1, "scope": 3, "layers": []}'],
)  # fmt: skip
def test_what_is_no_table_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "bad.json"
    path.write_text(content, encoding="utf-8")
    with pytest.raises(SchemaError):
        load_choices(path, HERE, SOON)


def test_hostile_tables_are_errors_of_one_line(path: Path) -> None:
    table = json.loads(path.read_text(encoding="utf-8"))
    table["layers"][0]["priorities"] = ["os.system"]
    path.write_text(json.dumps(table), encoding="utf-8")
    with pytest.raises(SchemaError, match=r"os\.system"):
        load_choices(path, HERE, SOON)
    with pytest.raises(SchemaError):
        load_choices(change(path, expires_at="never"), HERE, SOON)
    with pytest.raises(DataError, match="cannot be read"):
        load_choices(path.parent / "absent.json", HERE, SOON)


def test_only_an_answer_is_saved(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="nothing was chosen"):
        to_table(chosen(), "llama-3-8b", SHARES)
    with pytest.raises(UsageError, match="open"):
        to_table(chosen(timed(FA3, [1e-4]), timed(FLASHINFER, [2e-4])), "llama-3-8b", SHARES)
    decided = chosen(timed(FA3, 1e-4), timed(FLASHINFER, 2e-4))
    with pytest.raises(UsageError, match="cannot be written"):
        save(decided, "llama-3-8b", SHARES, tmp_path / "absent" / "choices.json")
    assert list(tmp_path.iterdir()) == []


def test_a_server_has_one_block_size(tmp_path: Path) -> None:
    advice = chosen(timed(FLASHINFER, 1e-4, "32q1s4k block=32"), timed(TRITON, 2e-4),
                    timed(FA3, 3e-4, "32q1s4k block=32"))  # fmt: skip
    (layer,) = to_table(advice, "llama-3-8b", SHARES)["layers"]
    assert layer["block_size"] == 32
    assert layer["priorities"] == ["FLASHINFER:FA3", "FLASH_ATTN:FA3"]


def test_what_is_no_file_is_not_replaced(tmp_path: Path) -> None:
    """Moved over /dev/full by root, a table would take the device's place."""
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    decided = chosen(timed(FA3, 1e-4), timed(FLASHINFER, 2e-4))
    with pytest.raises(UsageError, match="no regular file"):
        save(decided, "llama-3-8b", SHARES, pipe)
    assert pipe.is_fifo()
    assert list(tmp_path.iterdir()) == [pipe]


def test_a_full_disk_leaves_the_table_that_was_there(
    path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = path.read_text(encoding="utf-8")
    write = Path.write_text

    def half(self: Path, text: str, **more: Any) -> int:
        write(self, text[: len(text) // 2], **more)
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_text", half)
    with pytest.raises(UsageError, match="No space left"):
        save(chosen(timed(FA3, 1e-4), timed(FLASHINFER, 2e-4)), "llama-3-8b", SHARES, path)
    assert path.read_text(encoding="utf-8") == before
    assert list(path.parent.iterdir()) == [path]


def test_a_backend_is_saved_once_with_its_fastest_kernels() -> None:
    fa2 = timed(("FLASH_ATTN", "FA2"), 2e-4)
    advice = chosen(timed(FA3, 1e-4), fa2, timed(FLASHINFER, 3e-4))
    (layer,) = to_table(advice, "llama-3-8b", SHARES)["layers"]
    assert layer["priorities"] == ["FLASH_ATTN:FA3", "FLASHINFER:FA3"]


@pytest.mark.parametrize(
    ("old", "new", "said"),
    [
        ('"block_size": 16', '"block_size": 1e999', "wrong kinds"),
        ('"nvidia-h200"', '"\\u001b[31mevil"', r"x1b\[31mevil"),
    ],
)
def test_no_content_is_a_bug_or_reaches_the_terminal(
    path: Path, old: str, new: str, said: str
) -> None:
    text = path.read_text(encoding="utf-8")
    assert old in text
    path.write_text(text.replace(old, new), encoding="utf-8")
    with pytest.raises((SchemaError, DataError), match=said) as error:
        load_choices(path, HERE, SOON)
    assert str(error.value).isprintable()


def test_a_table_nested_too_deeply_and_versions_that_are_no_list(path: Path) -> None:
    with pytest.raises(SchemaError, match="no list"):
        load_choices(change(path, versions="torch"), HERE, SOON)
    path.write_text("[" * 200_000, encoding="utf-8")
    with pytest.raises(SchemaError, match="not valid JSON"):
        load_choices(path, HERE, SOON)
