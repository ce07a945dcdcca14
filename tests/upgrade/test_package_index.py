from __future__ import annotations

import os
import socket
import sys
from pathlib import Path

import pytest

from attnbench.errors import ExitCode, InfrastructureError, UsageError
from attnbench.upgrade.package_index import (
    IndexSettings,
    Wheel,
    find_wheel,
    open_session,
    pinned,
    public,
)
from tests.upgrade.package_server import PackageServer, package_server


def find(version: str, name: str = "vllm") -> Wheel:
    # Not `read()`: that starts pip, which one test is enough for.
    urls = (os.environ["PIP_INDEX_URL"], os.environ.get("PIP_EXTRA_INDEX_URL"))
    settings = IndexSettings(tuple(url for url in urls if url))
    with open_session(settings) as session:
        return find_wheel(name, version, settings, session)


@pytest.mark.parametrize("json", [True, False])
@pytest.mark.parametrize("digest", [True, False])
def test_both_forms_of_an_index(server: PackageServer, json: bool, digest: bool) -> None:
    server.json, server.with_digest = json, digest
    name = "vllm-0.22.1-cp38-abi3-manylinux_2_28_x86_64.whl"
    url = server.add(name, b"content")
    found = find("0.22.1")
    assert (found.filename, found.url.partition("#")[0]) == (name, url)
    known = "ed7002b439e9ac845f22357d822bac1444730fbdb6016d3ec9432297b9ec9f73"
    assert found.sha256 == (known if digest else None)


OWN = f"cp{sys.version_info.major}{sys.version_info.minor}"


@pytest.mark.parametrize(
    ("names", "best"),
    [
        (["cp38-abi3-manylinux_2_28_aarch64", "cp38-abi3-manylinux_2_28_x86_64"], 1),
        (["cp38-abi3-macosx_11_0_arm64", "cp38-abi3-manylinux_2_28_aarch64"], 1),
        (["cp39-cp39-manylinux1_x86_64", "cp38-abi3-manylinux1_x86_64"], 1),
        (["cp39-cp39-manylinux1_x86_64", f"{OWN}-{OWN}-manylinux1_x86_64"], 1),
        ([f"{OWN}-{OWN}-win_amd64", "cp39-cp39-linux_x86_64"], 1),
        (["cp38-abi3-win_amd64", "py3-none-any"], 1),
        (["cp38-abi3-manylinux1_x86_64.manylinux2014_x86_64", "py3-none-macosx_11_0_arm64"], 0),
    ],
)
def test_the_wheel_of_linux_whatever_machine_asks(
    server: PackageServer, names: list[str], best: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "darwin")
    for tags in names:
        server.add(f"vllm-0.22.1-{tags}.whl", b"")
    server.add("vllm-0.22.1.tar.gz", b"")
    assert find("0.22.1").filename == f"vllm-0.22.1-{names[best]}.whl"


def test_a_local_version_only_if_there_is_no_plain_one(server: PackageServer) -> None:
    server.add("vllm-0.22.1+cu129-cp38-abi3-manylinux1_x86_64.whl", b"")
    assert "+cu129" in find("0.22.1").filename
    server.add("vllm-0.22.1-cp38-abi3-manylinux1_x86_64.whl", b"")
    assert "+cu129" not in find("0.22.1").filename
    assert "+cu129" in find("0.22.1+cu129").filename


def test_an_unknown_version_names_the_closest(server: PackageServer) -> None:
    for version in ("0.9.0", "0.21.0", "0.22.0", "0.22.1", "0.23.0", "0.33.0"):
        server.add(f"vllm-{version}-py3-none-any.whl", b"")
    with pytest.raises(UsageError) as caught:
        find("0.22.7")
    text = str(caught.value)
    assert "vllm==0.22.7: no such version" in text
    assert text.endswith("the closest are 0.22.0, 0.22.1, 0.23.0, 0.33.0")
    assert caught.value.exit_code == ExitCode.USAGE


def test_an_unknown_distribution_and_one_without_a_linux_wheel(server: PackageServer) -> None:
    with pytest.raises(UsageError, match="no such distribution"):
        find("1.0", "nothing")
    server.add("vllm-0.1.0.tar.gz", b"")
    with pytest.raises(UsageError, match=r"no Linux wheel .* only vllm-0\.1\.0\.tar\.gz"):
        find("0.1.0")


def test_no_network(server: PackageServer, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        port = unused.getsockname()[1]
        monkeypatch.setenv("PIP_INDEX_URL", f"http://me:secret@127.0.0.1:{port}/simple")
        with pytest.raises(InfrastructureError, match="cannot be read") as caught:
            find("0.22.1")
    assert caught.value.exit_code == ExitCode.INCOMPLETE
    assert "secret" not in str(caught.value)


def test_a_failing_index(server: PackageServer) -> None:
    server.statuses = [500]
    with pytest.raises(InfrastructureError, match="500"):
        find("0.22.1")


def test_the_configuration_of_pip_is_read(
    server: PackageServer, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = tmp_path / "pip.conf"
    config.write_text(
        "[global]\nindex-url = http://one/simple\nextra-index-url =\n    http://two/simple\n"
        "    file:///somewhere\nproxy = http://proxy:1\n[install]\nindex-url = http://three/simple\n"
    )
    monkeypatch.setenv("PIP_CONFIG_FILE", str(config))
    monkeypatch.setenv("PIP_CERT", "/certificates.pem")
    monkeypatch.setenv("PIP_INDEX_URL", server.url)
    assert IndexSettings.read() == IndexSettings(
        (server.url, "http://two/simple"), "/certificates.pem", "http://proxy:1"
    )
    monkeypatch.delenv("PIP_INDEX_URL")
    assert IndexSettings.read().urls[0] == "http://three/simple"
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    assert IndexSettings.read().urls == ("https://pypi.org/simple",)


def test_an_extra_index_is_asked_too(
    server: PackageServer, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.add("vllm-0.22.1-py3-none-any.whl", b"")
    with package_server() as other:
        other.add("vllm-0.23.0rc1-py3-none-any.whl", b"")
        monkeypatch.setenv("PIP_EXTRA_INDEX_URL", other.url)
        assert find("0.23.0rc1").url.startswith(other.url.removesuffix("/simple"))
        assert find("0.22.1").url.startswith(server.url.removesuffix("/simple"))


def test_pins_of_a_release() -> None:
    requires = [
        "torch==2.11.0",
        "FlashInfer.Python==0.6.11.post2",
        "numpy>=2",
        'xgrammar==0.1; platform_machine == "s390x"',
        'triton==3.0; extra == "old"',
        "ray==2.*",
    ]
    assert pinned(requires, "flashinfer-python") == "0.6.11.post2"
    assert pinned(requires, "torch") == "2.11.0"
    for none in ("numpy", "xgrammar", "triton", "ray", "absent"):
        assert pinned(requires, none) is None


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("https://pypi.org/simple", "https://pypi.org/simple"),
        ("https://me:secret@host:8080/simple?x=1", "https://host:8080/simple?x=1"),
        ("someone@example.org", "someone@example.org"),
    ],
)
def test_no_password_is_shown(text: str, shown: str) -> None:
    assert public(text) == shown
