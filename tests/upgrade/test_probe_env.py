from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import venv
from pathlib import Path

import pytest

from attnbench.errors import CorruptDataError, DataError, InfrastructureError, UsageError
from attnbench.upgrade import probe_env
from attnbench.upgrade.cache import STAMP, default_cache_folder, read_stamp
from attnbench.upgrade.probe_env import make_environment, numbered_wheel, prepare
from attnbench.upgrade.versions import SELECTOR_FILE, installed_source, parse_source
from tests.upgrade.conftest import Heard
from tests.upgrade.package_server import PackageServer, vllm_wheel, wheel_bytes
from tests.upgrade.test_versions import commit, make_tree

WHEEL = "vllm-1.0-cp38-abi3-manylinux_2_28_x86_64.whl"
SETUP = """
from setuptools import setup
ext_modules = []
if _is_cuda() or _is_hip():
    ext_modules.append(CMakeExtension(name="vllm._moe_C"))
    if _is_cuda():
        ext_modules.append(CMakeExtension("vllm._flash_C", optional=True))
if _is_hip():
    ext_modules.append(CMakeExtension(name="vllm._rocm_C"))
elif _is_cuda():
    ext_modules.append(CMakeExtension(name="vllm.flash._fa3_C"))
setup(ext_modules=ext_modules)
"""
TREE = {
    SELECTOR_FILE: "WORD = 'one'\n",
    "vllm/__init__.py": "",
    "vllm/kernel.cu": "",
    "vllm/third_party/ours.py": "of the tree",
    "setup.py": SETUP,
    "requirements/cuda.txt": "-r common.txt\n--extra-index-url x\ntorch==2.11.0  # for CUDA 13\n",
    "requirements/common.txt": "# all\nregex\nflashinfer-python==0.1\n",
}


@pytest.fixture
def index(server: PackageServer, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> PackageServer:
    """An index with a small vLLM, its FlashInfer, and two packages to import."""
    server.add(WHEEL, vllm_wheel("1.0", compiled=1000, flashinfer="0.1"))
    flashinfer = wheel_bytes("flashinfer-python", "0.1", {"flashinfer/__init__.py": b""})
    server.add("flashinfer_python-0.1-py3-none-any.whl", flashinfer)
    for name in ("transformers", "pydantic", "cutlery"):
        wheel = wheel_bytes(name, "1.0", {f"{name}/__init__.py": b""}, ("nothing-such",))
        server.add(f"{name}-1.0-py3-none-any.whl", wheel)
    pins = tmp_path / "pins.txt"
    pins.write_text("# two\ntransformers==1.0\n\npydantic==1.0  # why\n")
    monkeypatch.setattr(probe_env, "REQUIREMENTS", pins)
    return server


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """An environment that costs nothing, where it is not what is tested."""
    monkeypatch.setattr(probe_env, "make_environment", lambda *_args: Path(sys.executable))


def run(python: Path, code: str) -> str:
    done = subprocess.run(
        [str(python), "-I", "-c", code], capture_output=True, text=True, check=True
    )
    return done.stdout.strip()


@pytest.mark.slow
def test_a_version_number_from_nothing_to_ready(
    index: PackageServer, tmp_path: Path, tell: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = tmp_path / "cache"
    version = prepare(parse_source("vllm==1.0"), tell, cache)
    assert version.vllm_version == "1.0"
    assert version.label == "vllm 1.0"
    assert version.requires == ("torch==2.11.0", "flashinfer-python==0.1")
    assert version.how == f"Python files of {WHEEL}; with the FlashInfer it pins, 0.1"
    assert not version.on_device
    vllm, flashinfer = version.paths
    assert (vllm / SELECTOR_FILE).is_file()
    assert not list(vllm.rglob("*.so"))
    assert (flashinfer / "flashinfer/__init__.py").is_file()
    # torch is this interpreter's, and nothing else that is installed here is seen.
    seen = run(
        version.python,
        "import json, importlib.util as u, torch, transformers;"
        "print(json.dumps([torch.__file__, u.find_spec('pytest'), u.find_spec('pip')]))",
    )
    torch_file, pytest_spec, pip_spec = json.loads(seen)
    assert Path(torch_file).parent.is_symlink()
    assert (pytest_spec, pip_spec) == (None, None)
    assert "2 packages" in tell.notes[-1]
    assert tell.advanced["packages"] == tell.totals["packages"] == 2

    # The second time nothing is asked of the network.
    before, said = len(index.requests), len(tell.notes)
    assert prepare(parse_source("vllm==1.0"), tell, cache) == version
    assert (len(index.requests), len(tell.notes)) == (before, said)

    # It has been shown to work; importing torch each time is most of this test.
    monkeypatch.setattr(probe_env, "_check", lambda _python: None)

    # Without its stamp the environment is half-made, and made anew.
    environment = version.python.parent.parent
    (environment / STAMP).unlink()
    (environment / "left-over").touch()
    assert make_environment(cache, tell) == version.python
    assert not (environment / "left-over").exists()

    # More packages make another environment; without their dependencies, as the others.
    more = make_environment(cache, tell, ("cutlery==1.0",))
    assert more != version.python
    run(more, "import cutlery")


def test_an_environment_that_cannot_be_made(
    index: PackageServer, tmp_path: Path, tell: Heard, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"nothing-such.*what you added"):
        make_environment(tmp_path, tell, ("nothing-such==1.0",))
    probe_env.REQUIREMENTS.write_text("transformers==2.0\n")
    with pytest.raises(InfrastructureError, match=r"pip cannot install.*transformers==2\.0"):
        make_environment(tmp_path, tell)
    assert not [one for one in (tmp_path / "environments").iterdir() if read_stamp(one)]


def test_two_at_once_fetch_once(index: PackageServer, tmp_path: Path, tell: Heard) -> None:
    start = threading.Barrier(2)
    found: list[Path] = []

    def one() -> None:
        start.wait()
        found.append(numbered_wheel("vllm", "1.0", tmp_path, tell, required=SELECTOR_FILE))

    threads = [threading.Thread(target=one) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [tmp_path / "wheels/vllm-1.0/files"] * 2
    assert len(index.asked("/simple/")) == 1
    assert not (tmp_path / "wheels/vllm-1.0/chunks").exists()


@pytest.mark.usefixtures("quick")
def test_a_wheel_file(index: PackageServer, tmp_path: Path, tell: Heard) -> None:
    file = tmp_path / WHEEL
    file.write_bytes(vllm_wheel("1.0", compiled=1000))
    version = prepare(parse_source(str(file)), tell, tmp_path / "cache")
    assert version.label == f"vllm 1.0 of {file}"
    assert version.how == f"wheel {file}; it pins no FlashInfer, and none is there"
    assert len(version.paths) == 1
    assert index.requests == []
    # A new file under the old name is another version.
    file.write_bytes(vllm_wheel("1.0", compiled=2000))
    assert prepare(parse_source(str(file)), tell, tmp_path / "cache").paths != version.paths
    file.write_bytes(b"")
    with pytest.raises(CorruptDataError, match="not a readable wheel"):
        prepare(parse_source(str(file)), tell, tmp_path / "cache")


@pytest.mark.usefixtures("quick")
def test_a_source_tree_at_a_commit_and_as_it_is(
    index: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    tree = make_tree(tmp_path / "tree", TREE)
    built = {
        "vllm/__init__.py": b"not this",
        "vllm/third_party/mla.py": b"of the wheel",
        "vllm/third_party/ours.py": b"not this",
    }
    index.add("vllm-1.2.3-py3-none-any.whl", wheel_bytes("vllm", "1.2.3", built))
    first = commit(tree)
    subprocess.run(["git", "-C", str(tree), "tag", "v1.2.3"], check=True)
    (tree / SELECTOR_FILE).write_text("WORD = 'two'\n")
    second = commit(tree, "two")
    (tree / SELECTOR_FILE).write_text("WORD = 'three'\n")
    cache = tmp_path / "cache"

    tagged = prepare(parse_source(f"{tree}@v1.2.3"), tell, cache)
    assert (tagged.paths[0] / SELECTOR_FILE).read_text() == "WORD = 'one'\n"
    assert not (tagged.paths[0] / "vllm/kernel.cu").exists()
    assert tagged.vllm_version == "1.2.3"
    assert tagged.requires == ("regex", "flashinfer-python==0.1", "torch==2.11.0")
    assert tagged.how == (
        f"source tree {tree} at commit {first[:12]}; files that only a build adds from the wheel "
        "of 1.2.3; with the FlashInfer it pins, 0.1"
    )
    assert (tagged.paths[0] / "vllm/third_party/mla.py").read_text() == "of the wheel"
    assert (tagged.paths[0] / "vllm/third_party/ours.py").read_text() == "of the tree"
    assert (tagged.paths[0] / "vllm/__init__.py").read_text() == ""
    record = tagged.paths[0] / "vllm-1.2.3.dist-info/RECORD"
    names = [line.partition(",")[0] for line in record.read_text().split()]
    assert names == ["vllm/_flash_C.abi3.so", "vllm/_moe_C.abi3.so", "vllm/flash/_fa3_C.abi3.so"]

    later = prepare(parse_source(f"{tree}@HEAD"), tell, cache)
    assert (later.paths[0] / SELECTOR_FILE).read_text() == "WORD = 'two'\n"
    assert later.vllm_version.startswith("1.2.3+1.g")
    assert later.vllm_version.endswith(second[:7])

    now = prepare(parse_source(str(tree)), tell, cache)
    assert (now.paths[0] / SELECTOR_FILE).read_text() == "WORD = 'three'\n"
    assert "as it is on disk; files that only a build adds" in now.how
    requests = len(index.requests)
    assert prepare(parse_source(str(tree)), tell, cache) == now
    (tree / SELECTOR_FILE).write_text("WORD = 'four!'\n")
    again = prepare(parse_source(str(tree)), tell, cache)
    assert (again.paths[0] / SELECTOR_FILE).read_text() == "WORD = 'four!'\n"
    assert len(index.requests) == requests

    # Built in place, the tree has everything itself.
    (tree / "vllm/_C.abi3.so").touch()
    in_place = prepare(parse_source(str(tree)), tell, cache)
    assert "only a build" not in in_place.how
    assert not (in_place.paths[0] / "vllm/third_party/mla.py").exists()


def test_a_tree_after_no_known_release(index: PackageServer, tmp_path: Path, tell: Heard) -> None:
    tree = make_tree(tmp_path / "tree", TREE)
    with pytest.raises(DataError, match="no release tag before it"):
        prepare(parse_source(str(tree)), tell, tmp_path / "cache")
    commit(tree)
    subprocess.run(["git", "-C", str(tree), "tag", "v7.7"], check=True)
    with pytest.raises(DataError, match=r"comes after vllm 7\.7.*no such version"):
        prepare(parse_source(f"{tree}@HEAD"), tell, tmp_path / "cache")


@pytest.mark.usefixtures("quick")
def test_a_source_distribution_and_an_unpacked_wheel(
    index: PackageServer, tmp_path: Path, tell: Heard
) -> None:
    info = "Metadata-Version: 2.1\nName: vllm\nVersion: 3.4\nRequires-Dist: torch==2.11.0\n"
    index.add("vllm-3.4-py3-none-any.whl", wheel_bytes("vllm", "3.4", {"vllm/x.py": b""}))
    plain = {name: text for name, text in TREE.items() if not name.startswith("requirements")}
    tree = make_tree(tmp_path / "tree", {**plain, "PKG-INFO": info})
    make_tree(tree, {"vllm.egg-info/PKG-INFO": info})
    version = prepare(parse_source(str(tree)), tell, tmp_path / "cache")
    assert (version.vllm_version, version.requires) == ("3.4", ("torch==2.11.0",))
    assert "_moe_C" in (version.paths[0] / "vllm-3.4.dist-info/RECORD").read_text()
    make_tree(tmp_path / "wheel", {SELECTOR_FILE: "", "vllm-5.6.dist-info/METADATA": info})
    unpacked = prepare(parse_source(str(tmp_path / "wheel")), tell, tmp_path / "cache")
    assert unpacked.paths == (tmp_path / "wheel",)


@pytest.mark.parametrize(
    ("setup", "message"),
    [(None, r"no setup\.py"), ("x = 1\n", "no compiled module"), ("if", "cannot be read")],
)
def test_a_tree_that_does_not_say_what_it_compiles(
    setup: str | None, message: str, tmp_path: Path, tell: Heard
) -> None:
    tree = make_tree(tmp_path / "tree", {SELECTOR_FILE: ""})
    if setup is not None:
        (tree / "setup.py").write_text(setup)
    with pytest.raises(DataError, match=message):
        prepare(parse_source(str(tree)), tell, tmp_path / "cache")


def make_installed(folder: Path, files: dict[str, str]) -> Path:
    venv.EnvBuilder(symlinks=True).create(folder)
    site = next(folder.glob("lib/python*/site-packages"))
    return make_tree(site, files)


INFO = {
    "vllm-2.0.dist-info/METADATA": "Metadata-Version: 2.1\nName: vllm\nVersion: 2.0\n"
    "Requires-Dist: torch==2.11.0\n",
    "vllm-2.0.dist-info/RECORD": "vllm/_C.abi3.so,,\nvllm/__init__.py,,\n",
}
CODE = {"vllm/__init__.py": "raise RuntimeError('not to be imported')", SELECTOR_FILE: ""}
TORCH = {"torch/__init__.py": "__version__ = '2.11'"}


def test_an_installed_environment_is_asked_with_its_own_interpreter(
    tmp_path: Path, tell: Heard
) -> None:
    site = make_installed(tmp_path / "env", {**INFO, **CODE, **TORCH, "vllm/_C.abi3.so": ""})
    version = prepare(installed_source(tmp_path / "env"), tell, tmp_path / "cache")
    assert version.python == tmp_path / "env/bin/python"
    assert version.paths == (site,)
    assert (version.vllm_version, version.requires) == ("2.0", ("torch==2.11.0",))
    # Installed for editing, RECORD lists no compiled module: those on disk are told instead.
    (site / "vllm-2.0.dist-info/RECORD").write_text("__editable___vllm.py,,\n")
    overlay, again = prepare(installed_source(tmp_path / "env"), tell, tmp_path / "cache").paths
    assert again == site
    assert (overlay / "vllm-2.0.dist-info/RECORD").read_text().split() == ["vllm/_C.abi3.so,,"]


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "no vLLM is installed there"),
        ({**CODE, **TORCH}, "no vLLM is installed there"),
        ({**INFO, **CODE}, "broken environment: torch cannot be imported"),
        ({**INFO, **CODE, "torch/__init__.py": "import gone"}, "torch cannot be imported .*gone"),
        ({**INFO, **TORCH, "vllm/__init__.py": ""}, "no attention selector in vLLM 2.0"),
        ({"sitecustomize.py": "import os; os._exit(7)"}, "ended with exit code 7"),
    ],
)
def test_broken_environments(
    files: dict[str, str], message: str, tmp_path: Path, tell: Heard
) -> None:
    make_installed(tmp_path / "env", files)
    with pytest.raises(UsageError, match=message):
        prepare(installed_source(tmp_path / "env"), tell, tmp_path / "cache")


def test_an_interpreter_that_does_not_start(tmp_path: Path, tell: Heard) -> None:
    python = tmp_path / "python"
    python.write_bytes(b"\x7fELF nothing")
    python.chmod(0o755)
    with pytest.raises(UsageError, match="does not start"):
        prepare(installed_source(python), tell, tmp_path / "cache")


def test_another_distribution_has_no_selector(tmp_path: Path, tell: Heard) -> None:
    with pytest.raises(UsageError, match="flashinfer-python has no attention selector"):
        prepare(parse_source("flashinfer-python==0.1"), tell, tmp_path)


def test_the_cache_folder(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_cache_folder() == tmp_path / "attnbench/upgrade"
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    for unusable in ("", "relative"):
        monkeypatch.setenv("XDG_CACHE_HOME", unusable)
        assert default_cache_folder() == tmp_path / "home/.cache/attnbench/upgrade"


def test_a_cache_folder_that_cannot_be_written(tmp_path: Path, tell: Heard) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UsageError, match="--cache-dir"):
        prepare(parse_source("vllm==1.0"), tell, tmp_path / "file" / "inside")


def test_the_pins_are_exact_and_do_not_bring_torch() -> None:
    pins = probe_env._pins()
    names = {one.partition("==")[0] for one in pins}
    assert len(names) == len(pins) > 60
    assert all("==" in one for one in pins)
    assert {"transformers", "pydantic", "xgrammar", "gguf", "numpy"} <= names
    assert not names & {"torch", "triton", "vllm", "flashinfer-python"}


@pytest.mark.network
@pytest.mark.timeout(900)
def test_the_real_releases(tmp_path: Path, tell: Heard) -> None:
    # ATTNBENCH_TEST_CACHE keeps what came, for the next run.
    cache = Path(os.environ.get("ATTNBENCH_TEST_CACHE", str(tmp_path)))
    pins = {"0.22.1": "0.6.11.post2", "0.30.0": "0.6.18.post1", "0.33.0": "0.7.2.post1"}
    for number, flashinfer in pins.items():
        version = prepare(parse_source(f"vllm=={number}"), tell, cache)
        assert version.vllm_version == number
        assert f"flashinfer-python=={flashinfer}" in version.requires
        assert version.how.endswith(flashinfer)
        vllm = version.paths[0]
        assert (vllm / SELECTOR_FILE).is_file()
        assert "vllm/_C_stable_libtorch" in (vllm / f"vllm-{number}.dist-info/RECORD").read_text()
        paths = [str(path) for path in version.paths]
        code = f"import sys; sys.path[:0] = {paths!r}; import flashinfer.utils, transformers, gguf"
        run(version.python, code)
    came = [read_stamp(one) for one in (cache / "wheels").iterdir() if one.is_dir()]
    print(sum(one["fetched_bytes"] for one in came if one), "bytes of wheels")
    with pytest.raises(UsageError, match=r"vllm==0\.22\.9: no such version .*0\.22\.1"):
        prepare(parse_source("vllm==0.22.9"), tell, cache)
