"""`attnbench traffic` as a user types it: from a trace to a suite that `run` measures."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from dataclasses import fields
from pathlib import Path

import numpy as np
import pytest

from attnbench.cli.choose import choose
from attnbench.cli.itl import itl
from attnbench.cli.traffic import traffic
from attnbench.traffic.reduced import TraceOptions
from attnbench.workload import load_suites
from tests.cli.conftest import Attnbench


@pytest.fixture
def trace(project: Path) -> Path:
    rng = np.random.default_rng(0)
    arrival = np.cumsum(rng.exponential(0.05, 400))
    rows = [f"{t:.4f},{rng.integers(1, 4000)},{rng.integers(1, 60)}" for t in arrival]
    path = project / "day.csv"
    path.write_text("\n".join(["arrival_s,input_tokens,output_tokens", *rows]), encoding="utf-8")
    return path


def test_a_trace_becomes_a_suite_that_run_takes(
    attnbench: Attnbench, project: Path, trace: Path
) -> None:
    out = project / "suites" / "day.py"
    done = attnbench(
        "traffic", str(trace), "--tp", "8", "--representatives", "32", "--out", str(out),
        "--format", "json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout)
    assert 16 <= len(rows) <= 32
    num_steps = int(done.stderr.split(" make ")[1].split()[0])
    assert sum(row["weight"] for row in rows) == pytest.approx(num_steps, rel=0.01)
    assert sum(row["seconds_share_pct"] for row in rows) == pytest.approx(100, abs=0.1)
    assert " steps held back, at the roofline" in done.stderr
    suite = load_suites(project / "suites")["day"]
    assert {workload.text for workload in suite.workloads("full")} == {
        row["workload"] for row in rows
    }
    plan = attnbench("run", "--suite", "day", "--preset", "full", "--dry-run", "--format", "json")
    assert plan.returncode == 0, plan.stderr
    assert {point["workload"] for point in json.loads(plan.stdout)} <= {
        row["workload"] for row in rows
    }
    again = attnbench("traffic", str(trace), "--tp", "8", "--representatives", "32", "-f", "json")
    assert again.stdout == done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("--device", "NVIDIA H2000"), "no published peaks"),
        (("--out", "Suite.txt"), "name a .py file"),
        (("--representatives", "2"), "16 or more"),
        (("--requests", "10"), "too short"),
        (("--model", "gemma-2-9b"), "are not known"),
        (("--rate-scale", "nan"), "rate scale"),
        (("--request-rate", "2"), "leave --request-rate out"),
        (("--layer", "model=llama-3-8b"), "--layer: model= is said by --model"),
        (("--layer", "kv=fp8_e4m3 layers=2"), "--layer: layers= is said by --model"),
        (("--layer", "tp=8"), "--layer: tp= is said by --model and --tp"),
    ],
)
def test_bad_input_is_one_line(
    attnbench: Attnbench, trace: Path, words: tuple[str, ...], said: str
) -> None:
    done = attnbench("traffic", str(trace), *words)
    assert done.returncode == 2
    assert said in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_folder_that_is_not_there_leaves_nothing(attnbench: Attnbench, trace: Path) -> None:
    out = trace.parent / "none" / "day.py"
    done = attnbench("traffic", str(trace), "--representatives", "16", "--out", str(out))
    assert done.returncode == 2
    assert "cannot write" in done.stderr
    assert not out.parent.exists()


def totals(attnbench: Attnbench, *words: str) -> dict[str, float]:
    """Weights by batch."""
    done = attnbench("traffic", *words, "--tp", "8", "--representatives", "32", "--format", "json")
    assert done.returncode == 0, done.stderr
    return {row["workload"]: row["weight"] for row in json.loads(done.stdout)}


def test_an_unsorted_trace_is_sorted_where_asked_for(
    attnbench: Attnbench, project: Path, trace: Path
) -> None:
    head, *rows = trace.read_text(encoding="utf-8").splitlines()
    mixed = project / "mixed.csv"
    mixed.write_text("\n".join([head, *rows[1::2], *rows[::2]]), encoding="utf-8")
    refused = attnbench("traffic", str(mixed))
    assert refused.returncode == 2
    assert "--sort-arrivals" in refused.stderr
    assert totals(attnbench, str(mixed), "--sort-arrivals") == totals(attnbench, str(trace))


def test_a_sharegpt_trace_arrives_at_the_rate_asked_for(
    attnbench: Attnbench, project: Path
) -> None:
    talks = [
        {"conversations": [{"value": "a" * (40 + 97 * i % 9000)}, {"value": "b" * (60 + i % 90)}]}
        for i in range(300)
    ]
    path = project / "talks.json"
    path.write_text(json.dumps(talks), encoding="utf-8")
    refused = attnbench("traffic", str(path))
    assert refused.returncode == 2
    assert "give --request-rate" in refused.stderr
    slow, fast = (totals(attnbench, str(path), "--request-rate", rate) for rate in ("2", "50"))
    assert sum(slow.values()) > sum(fast.values())  # denser arrivals share steps


def test_the_layers_of_a_config_are_in_the_error_that_is_told(
    attnbench: Attnbench, project: Path, trace: Path
) -> None:
    """The schedule's clock has all six layers, and so has what is predicted of the window."""
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 2048,
        "num_hidden_layers": 6, "num_attention_heads": 16, "num_key_value_heads": 8,
        "head_dim": 128, "intermediate_size": 4096, "vocab_size": 32000, "torch_dtype": "bfloat16",
        "max_position_embeddings": 8192,
    }  # fmt: skip
    path = project / "config.json"
    path.write_text(json.dumps(config), encoding="utf-8")
    done = attnbench("traffic", str(trace), "--model", str(path), "-f", "json")
    assert done.returncode == 0, done.stderr
    told = done.stderr.split("total ")[1].split(" %")[0]
    assert abs(float(told)) < 3


@pytest.mark.parametrize("verb", [traffic, itl, choose])
def test_every_verb_takes_all_options_of_a_trace_by_the_same_defaults(
    verb: Callable[..., None],
) -> None:
    parameters = inspect.signature(verb).parameters
    wanted = {field.name: field.default for field in fields(TraceOptions)}
    assert {name: parameters[name].default for name in wanted} == wanted
