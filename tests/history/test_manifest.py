"""The manifest repository, with real git."""

from __future__ import annotations

import random
import threading
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.errors import DataError
from attnbench.history.manifest import (
    MARKER,
    find_stack,
    is_manifest,
    stacks_of,
    subject_of,
    write_manifest,
)
from attnbench.history.manifest_files import LOCK_FILE, MACHINE_FILE, read_stack, stack_files
from attnbench.history.stacks import Stack, merged
from tests.history.fake import HOSTILE
from tests.history.manifests import START, git, made, state

EVIL = (
    "--index-url==http://evil",
    "-r==/etc/passwd",
    "a @ http://evil==1",
    "torch==1; rm -rf ~",
    "torch==$(touch pwned)",
    "new\nline==1\n-r x",
    "nul\0==\x1b[31m",
    "data 5==\ncommit refs/heads/main",
    "turned\u202earound==\U0001f600",
    'quote"""==\\',
    f"{HOSTILE}==1",
    "",
    "==",
)


def test_one_commit_per_stack_that_tools_can_read(tmp_path: Path) -> None:
    repository = tmp_path / "deep" / "stacks"
    stacks = [
        made(0, "python==3.11.7", "torch==2.12.0", "gxx==12.2.0"),
        made(1, "torch==2.13.0+cu130"),
    ]
    written = write_manifest(repository, stacks)
    assert (written.added, written.moved) == (2, 0)
    log = git(repository, "log", "--reverse", "--format=%s|%at|%ct").splitlines()
    first, second = (2 * f"|{int(s.first_measured.timestamp())}" for s in stacks)
    assert log == [
        f"h200: first stack, torch 2.12.0, driver 580.1, cuda 13.0{first}",
        f"h200: - gxx 12.2.0, - python 3.11.7, torch 2.12.0 -> 2.13.0+cu130{second}",
    ]
    # What pip cannot install is not in the lock file.
    assert git(repository, "show", f"HEAD~:h200/{LOCK_FILE}") == "torch==2.12.0"
    assert (repository / "h200" / LOCK_FILE).read_text() == "torch==2.13.0+cu130\n"
    assert 'driver = "580.1"' in (repository / "h200" / MACHINE_FILE).read_text()
    found = stacks_of(repository)
    assert [replace(s, commit="") for s in found] == stacks
    assert [s.commit for s in found] == git(repository, "rev-list", "--reverse", "HEAD").split()
    assert tuple(found) == written.stacks
    assert git(repository, "for-each-ref", "--format=%(refname)") == "refs/heads/main"


def test_writing_again_changes_nothing_and_anywhere_gives_the_same(tmp_path: Path) -> None:
    stacks = [made(day) for day in range(4)]
    write_manifest(tmp_path / "a", stacks)
    before = state(tmp_path / "a")
    assert before[1] == ""
    again = write_manifest(tmp_path / "a", [*reversed(stacks), stacks[0]])
    assert (again.added, again.moved) == (0, 0)
    assert state(tmp_path / "a") == before
    write_manifest(tmp_path / "b", list(reversed(stacks)))
    for night in range(1, 5):
        write_manifest(tmp_path / "c", stacks[:night])
    assert state(tmp_path / "b") == state(tmp_path / "c") == before


def test_a_stack_that_comes_back_keeps_its_one_commit(tmp_path: Path) -> None:
    a, b = made(0), made(1)
    write_manifest(tmp_path, [a, b])
    before = state(tmp_path)
    assert (
        write_manifest(tmp_path, [replace(a, first_measured=START + timedelta(days=2))]).added == 0
    )
    assert state(tmp_path) == before


def test_what_the_repository_has_is_never_dropped(tmp_path: Path) -> None:
    write_manifest(tmp_path, [made(0), made(1)])
    written = write_manifest(tmp_path, [made(2)])
    assert (len(written.stacks), written.added, written.moved) == (3, 1, 0)


def test_results_that_arrive_late_take_their_place(tmp_path: Path) -> None:
    stacks = [made(day) for day in range(4)]
    write_manifest(tmp_path / "all", stacks)
    write_manifest(tmp_path / "late", [stacks[0], stacks[2], stacks[3]])
    written = write_manifest(tmp_path / "late", [stacks[1]])
    assert (written.added, written.moved) == (1, 2)
    assert state(tmp_path / "late") == state(tmp_path / "all")
    # Known stacks that turn out to be older, too.
    older = replace(stacks[3], first_measured=START - timedelta(days=9))
    assert write_manifest(tmp_path / "late", [older]).moved == 4
    assert [s.first_measured for s in stacks_of(tmp_path / "late")] == sorted(
        s.first_measured for s in [*stacks[:3], older]
    )


@settings(max_examples=4, deadline=None)
@given(seed=st.integers(0, 2**32))
def test_any_order_of_any_nights_gives_one_history(
    tmp_path_factory: pytest.TempPathFactory, seed: int
) -> None:
    rng = random.Random(seed)
    pool = [made(rng.randrange(4), device=rng.choice(["a", "b"]), driver=d) for d in "1122"]
    nights = [
        [replace(s, first_measured=START + timedelta(hours=rng.randrange(-99, 99)))]
        for s in rng.choices(pool, k=6)
    ]
    folder = tmp_path_factory.mktemp("any")
    tips = set()
    for number in range(2):
        rng.shuffle(nights)
        for night in nights:
            write_manifest(folder / str(number), night)
        tips.add(state(folder / str(number)))
    write_manifest(folder / "once", [s for night in nights for s in night])
    assert tips == {state(folder / "once")}
    # The oracle: the earliest of each, sorted.
    earliest = {
        (s.device_class, s.key): min(
            t.first_measured
            for n in nights
            for t in n
            if (t.device_class, t.key) == (s.device_class, s.key)
        )
        for n in nights
        for s in n
    }
    found = {(s.device_class, s.key): s.first_measured for s in stacks_of(folder / "once")}
    assert found == earliest
    assert list(found.values()) == sorted(found.values())


def test_devices_are_compared_with_themselves(tmp_path: Path) -> None:
    cpu = {"device": "cpu-xeon-2c", "driver": ""}
    write_manifest(
        tmp_path,
        [made(0), made(0.5, "torch==2.0.0", **cpu), made(1), made(2, "torch==2.1.0", **cpu)],
    )
    subjects = git(tmp_path, "log", "--reverse", "--format=%s").splitlines()
    assert subjects[2:] == ["h200: torch 2.0.0 -> 2.1.0", "cpu-xeon-2c: torch 2.0.0 -> 2.1.0"]
    assert git(tmp_path, "show", "--format=", "--name-only", "HEAD").splitlines() == [
        f"cpu-xeon-2c/{MACHINE_FILE}",
        f"cpu-xeon-2c/{LOCK_FILE}",
    ]


def test_a_driver_alone_is_a_commit(tmp_path: Path) -> None:
    old = made(0, "torch==2.0.0", driver="570.1")
    write_manifest(
        tmp_path, [old, replace(old, driver_version="580.1", first_measured=START + timedelta(1))]
    )
    assert git(tmp_path, "log", "-1", "--format=%s") == "h200: driver 570.1 -> 580.1"


def test_hostile_text_is_text(tmp_path: Path) -> None:
    stacks = [
        made(n, name, "numpy==1", device=f"../../{name[:9]}", driver=name)
        for n, name in enumerate(EVIL)
    ]
    stacks += [replace(made(50), container_digest=name, cuda_version=name) for name in EVIL]
    repository = tmp_path / "stacks"
    write_manifest(repository, stacks)
    assert [replace(s, commit="") for s in stacks_of(repository)] == merged(stacks)
    assert state(repository)[1] == ""
    assert [path.name for path in tmp_path.iterdir()] == ["stacks"]
    for lock in repository.glob(f"*/{LOCK_FILE}"):
        assert set(lock.read_text().splitlines()) <= {"numpy==1", "python==3.11.7", "torch==2.50.0"}
    for subject in git(repository, "log", "--format=%s").split("\n"):
        assert subject.isprintable()
        assert len(subject) <= 120
    files = git(repository, "-c", "core.quotePath=true", "ls-files").splitlines()
    assert all(file == MARKER or file.count("/") == 1 for file in files)


@settings(max_examples=200, deadline=None)
@given(
    packages=st.lists(
        st.one_of(st.text(), st.sampled_from(EVIL), st.from_regex(r"[a-z]+==[0-9.]+"))
    ),
    texts=st.tuples(*[st.text()] * 4),
)
def test_any_stack_survives_its_files(packages: list[str], texts: tuple[str, ...]) -> None:
    stack = Stack(
        device_class=texts[0],
        stack_id="id",
        packages=tuple(sorted(packages)),
        driver_version=texts[1],
        cuda_version=texts[2],
        container_digest=texts[3],
        first_measured=START,
    )
    files = stack_files(stack)
    assert read_stack(files[MACHINE_FILE], files[LOCK_FILE]) == stack
    assert all(line and line[0].isalnum() for line in files[LOCK_FILE].splitlines())
    assert "\n" not in subject_of(stack, None)


def test_clocks_that_were_never_set(tmp_path: Path) -> None:
    stacks = [
        replace(made(0, f"torch=={year}"), first_measured=datetime(year, 1, 1, tzinfo=UTC))
        for year in (1, 1969, 1970, 2199)
    ]
    write_manifest(tmp_path, stacks)
    assert [replace(s, commit="") for s in stacks_of(tmp_path)] == stacks
    assert git(tmp_path, "log", "--reverse", "--format=%at").split()[:3] == ["0", "0", "0"]


def test_nothing_measured_makes_no_commit(tmp_path: Path) -> None:
    assert write_manifest(tmp_path / "stacks", []).stacks == ()
    assert stacks_of(tmp_path / "stacks") == []
    assert not is_manifest(tmp_path / "stacks")
    assert write_manifest(tmp_path / "stacks", [made(0)]).added == 1


def test_two_nights_at_once(tmp_path: Path) -> None:
    stacks = [made(day) for day in range(6)]
    write_manifest(tmp_path / "all", stacks)
    threads = [
        threading.Thread(target=write_manifest, args=(tmp_path / "both", stacks[n::3]))
        for n in range(3)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert state(tmp_path / "both") == state(tmp_path / "all")


def test_a_stack_is_found_by_commit_or_key(tmp_path: Path) -> None:
    a, b = made(0, "torch==1"), made(1, "torch==1", device="b200")
    other = made(2, "torch==3")
    write_manifest(tmp_path, [a, b, other])
    stacks = stacks_of(tmp_path)
    assert find_stack(stacks, stacks[1].commit[:7]) == stacks[1]
    assert find_stack(stacks, other.key) == stacks[2]
    with pytest.raises(
        DataError, match=f"several stacks; name a commit: {stacks[0].commit[:10]} .h200"
    ):
        find_stack(stacks, a.key)
    for text in ("zzz", ""):
        with pytest.raises(DataError, match="names no stack; the newest is"):
            find_stack(stacks, text)
