"""What attnbench relies on in asv. A failure here names what a new asv changed."""

from __future__ import annotations

import importlib
import inspect
from pathlib import Path

import asv
import pytest
from asv.benchmarks import Benchmarks
from asv.config import Config
from asv.environment import Environment
from asv.machine import Machine, MachineCollection
from asv.plugins.virtualenv import Virtualenv
from asv.publishing import OutputPublisher
from asv.results import Results
from asv.runner import BenchmarkResult

from attnbench.asv_bridge import asv_api

#: name -> the parameters attnbench passes, in asv 0.6.6's order.
SIGNATURES = {
    "asv.main.main": [],
    "asv.config.Config.load": ["path"],
    "asv.results.Results": [
        "params",
        "requirements",
        "commit_hash",
        "date",
        "python",
        "env_name",
        "env_vars",
    ],
    "asv.results.Results.add_result": [
        "self",
        "benchmark",
        "result",
        "started_at",
        "duration",
        "record_samples",
        "append_samples",
        "selected_idx",
    ],
    "asv.results.Results.save": ["self", "result_dir"],
    "asv.results.get_filename": ["machine", "commit_hash", "env_name"],
    "asv.benchmarks.Benchmarks.get_benchmark_file_path": ["results_dir"],
    "asv.machine.Machine.get_defaults": [],
    "asv.machine.Machine.save": ["self", "results_dir"],
    "asv.machine.MachineCollection.get_machine_file_path": [],
    "asv.machine.MachineCollection.save": ["machine_name", "machine_info", "_path"],
    "asv.publishing.OutputPublisher.publish": [
        "conf",
        "repo",
        "benchmarks",
        "graphs",
        "revisions",
    ],
    "asv.util.load_json": ["path", "api_version", "js_comments"],
    "asv.util.write_json": ["path", "data", "api_version", "compact"],
    "asv.util.datetime_to_js_timestamp": ["dt"],
}


def _find(path: str) -> object:
    words = path.split(".")
    for size in range(len(words) - 1, 0, -1):
        try:
            found: object = importlib.import_module(".".join(words[:size]))
        except ImportError:
            continue
        for word in words[size:]:
            found = getattr(found, word)
        return found
    raise ImportError(path)


@pytest.mark.parametrize("path", SIGNATURES)
def test_signature(path: str) -> None:
    try:
        found = _find(path)
    except (ImportError, AttributeError) as error:
        pytest.fail(f"asv {asv.__version__} has no {path} ({error}); asv_api.py uses it")
    assert callable(found)
    names = list(inspect.signature(found).parameters)
    assert names == SIGNATURES[path], (
        f"asv {asv.__version__} changed {path} to {names}; asv_api.py passes {SIGNATURES[path]}"
    )


def test_fields_of_a_result() -> None:
    assert BenchmarkResult._fields == (
        "result",
        "samples",
        "number",
        "errcode",
        "stderr",
        "profile",
    ), f"asv {asv.__version__} changed BenchmarkResult; asv_api.save_commit fills it"


def test_file_versions() -> None:
    found = (Results.api_version, Benchmarks.api_version, Machine.api_version, Config.api_version)
    assert found == (2, 2, 1, 1), (
        f"asv {asv.__version__} changed a file format to {found}; export once and look at it"
    )


def test_config_keys_and_environment_type() -> None:
    conf = vars(Config())
    for key in ("repo", "benchmark_dir", "results_dir", "html_dir", "env_dir", "launch_method"):
        assert key in conf, f"asv {asv.__version__} has no configuration key {key}"
    assert Virtualenv.tool_name == "virtualenv"
    assert issubclass(Virtualenv, Environment)
    assert MachineCollection.api_version == 1


def test_asv_says_which_commit_is_installed() -> None:
    source = inspect.getsource(Environment)
    for name in ("ASV_COMMIT", "ASV_ENV_TYPE", "ASV_CONF_DIR"):
        assert f"'{name}'" in source, (
            f"asv {asv.__version__} no longer sets {name}; the commit under test is read from it"
        )


def test_a_link_can_be_put_into_the_page() -> None:
    page = Path(asv.__file__).parent / "www" / asv_api.WEB_PAGE
    assert page.read_text(encoding="utf-8").count(asv_api.WEB_PAGE_ANCHOR) == 1
    assert inspect.isclass(OutputPublisher)
    assert {"name", "button_label", "description", "order"} <= vars(OutputPublisher).keys()


def test_subcommands() -> None:
    from asv.commands import make_argparser

    _, subparsers = make_argparser()
    for command in (*asv_api.DISCOVERING, "compare", "publish"):
        assert command in subparsers.choices, f"asv {asv.__version__} has no `asv {command}`"


def test_runner_forms() -> None:
    """What a track_* method returns, and how a shared setup_cache is told apart."""
    from asv_runner.benchmarks._base import get_setup_cache_key
    from asv_runner.benchmarks.track import TrackBenchmark

    assert TrackBenchmark.name_regex.match("track_attention")
    assert "inspect.getsourcelines" in inspect.getsource(get_setup_cache_key)
    runner = importlib.import_module("asv.runner")
    assert "'samples' in data and 'number' in data" in inspect.getsource(runner)
