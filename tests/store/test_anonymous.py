"""Names go from any sentence, and nothing else does."""

from __future__ import annotations

import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from attnbench.store.anonymous import Anonymizer

#: `localhost` is every machine's name, and stays.
WORD = st.text(string.ascii_lowercase, min_size=8, max_size=12).filter("localhost".__ne__)
FILLER = st.text(string.ascii_letters + " .,:;()[]'\"=/\\-_<>", max_size=12)


@pytest.mark.parametrize(
    "text",
    [
        "heads 32/8, 900 GB/s, NHD/HND, and/or, s/d, 1 / 2, a // b, '/', 3/4",
        "see https://docs.pytorch.org/stable/notes.html, line 3",
        "flash_attn/cute/interface.py: block_size must be 16, 32 or 64",
        "attention sinks not supported; head_size 40 is not a multiple of 16",
        "square root of root; @triton.jit, a ~3/4 share",
    ],
)
def test_sentences_without_names_stay(text: str) -> None:
    assert Anonymizer(b"x" * 32, hosts=["gpu01"], users=["root", "ann"]).text(text) == text


@settings(deadline=None, max_examples=150)
@given(user=WORD, host=WORD, before=FILLER, after=FILLER, form=st.integers(0, 8))
def test_names_go_wherever_they_stand(
    user: str, host: str, before: str, after: str, form: int
) -> None:
    said = (
        f" /home/{user}/a",
        f" '/scratch/{user} x/a'",
        f" {user}",
        f" {user}@{host}.example.org",
        f" {host.upper()}",
        f" --x=/users/{user}",
        f" ~{user}/b",
        f" file:///{user}/{host}",
        f"\t/{host}/{user}:12",
    )[form]
    told = Anonymizer(b"s" * 32, hosts=[f"{host}.example.org"], users=[user])
    found = told.text(before + said + after).lower()
    assert user not in found
    assert host not in found


def test_one_machine_and_one_gpu_have_one_name_however_they_are_written() -> None:
    told = Anonymizer(b"s" * 32)
    uuid = "1b2c3d4e-aaaa-bbbb-cccc-0123456789ab"
    written = (uuid, uuid.upper(), f"GPU-{uuid}", f"gpu-{uuid.upper()}", f"MIG-GPU-{uuid}")
    assert len({told.gpu(text) for text in written}) == 1
    assert told.gpu(uuid) != told.gpu(uuid.replace("1b", "2b"))
    assert told.host("Node7") == told.host("node7") != told.host("node8")
    assert (told.gpu(""), told.host("")) == ("", "")
    # The same letters as a host and as a GPU are two things.
    assert told.host(uuid).removeprefix("host-") != told.gpu(uuid).removeprefix("gpu-")
