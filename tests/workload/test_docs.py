"""docs/workloads.md cannot rot: its keys, shapes and examples are those of the code."""

from __future__ import annotations

import doctest
import re
from pathlib import Path

import pytest

from attnbench.workload import (
    Suite,
    Workload,
    expand_ranges,
    expand_workloads,
    get_shape,
    shape_names,
)
from attnbench.workload import workload as workload_module
from attnbench.workload.text import KEYS

PAGE = Path(__file__).parents[2] / "docs" / "workloads.md"
TEXT = PAGE.read_text(encoding="utf-8")


def shapes_table() -> str:
    """The table of named shapes, in Markdown."""
    lines = [
        "| name | layers | heads | head size | features | source |",
        "|---|---|---|---|---|---|",
    ]
    for name in shape_names():
        shape = get_shape(name)
        size = str(shape.head_size)
        if shape.is_mla:
            size = (
                f"{shape.kv_lora_rank}+{shape.qk_rope_head_dim}"
                f":{shape.qk_nope_head_dim}+{shape.v_head_size}"
            )
        features = {
            f"window {shape.sliding_window}": shape.sliding_window,
            f"soft cap {shape.logits_soft_cap:g}": shape.logits_soft_cap,
            "sinks": shape.has_sink,
            "ALiBi": shape.use_alibi,
            "MLA": shape.is_mla,
        }
        repository = shape.source.removeprefix("https://huggingface.co/").partition("/blob")[0]
        lines.append(
            f"| `{name}` | {shape.num_layers} | {shape.num_heads}/{shape.num_kv_heads} | {size} "
            f"| {', '.join(f for f, on in features.items() if on)} "
            f"| [{repository}]({shape.source}) |"
        )
    return "\n".join(lines)


def test_the_table_of_shapes_is_the_codes() -> None:
    documented = TEXT.partition("prints this table -->\n")[2].partition("\n<!-- end of shapes")[0]
    assert documented == shapes_table(), f"paste this into {PAGE.name}:\n{shapes_table()}"


def test_every_key_is_documented_and_its_example_reads() -> None:
    section = TEXT.partition("## Keys")[2].partition("###")[0]
    examples = dict(re.findall(r"^\| `(\w+)=(\S+)` \|", section, re.MULTILINE))
    assert set(examples) == set(KEYS)
    for key, example in examples.items():
        KEYS[key].read(example)
    for key in KEYS.values():
        key.read(key.example)


@pytest.mark.parametrize(
    "line", re.findall(r"^```text\n(.*?)```", TEXT, re.S | re.M)[0].split("\n")
)
def test_the_first_examples_read(line: str) -> None:
    if line:
        assert Workload.parse(line).text == line


def test_batch_specs_of_the_table_have_the_phase_it_says() -> None:
    rows = re.findall(r"^\| `(\S+)` \| [^|]+ \| (\w+): ", TEXT, re.MULTILINE)
    assert len(rows) == 4
    for text, phase in rows:
        assert Workload.parse(text).phase == phase


def test_ranges_of_the_table_read() -> None:
    section = TEXT.partition("## Ranges")[2].partition("## ")[0]
    rows = re.findall(r"^\| `([^`]+)` \| ", section, re.MULTILINE)
    assert len(rows) == 6
    assert [len(expand_ranges(row)) for row in rows] == [3, 5, 4, 4, 4, 4]
    assert len(expand_workloads(rows)) == len({w.text for w in expand_workloads(rows)})


def test_named_shape_with_numbers_is_as_the_page_says() -> None:
    before, after = re.findall(r"`(8q1s4k [^`]+)` is `(8q1s4k [^`]+)`", TEXT)[0]
    assert Workload.parse(before).text == after


def test_python_of_the_page_runs() -> None:
    session, suite = re.findall(r"^```python\n(.*?)```", TEXT, re.S | re.M)
    example = doctest.DocTestParser().get_doctest(session, {}, "workloads.md", None, None)
    assert doctest.DocTestRunner().run(example).failed == 0
    namespace: dict[str, object] = {}
    exec(suite, namespace)
    loaded = namespace["SUITE"]
    assert isinstance(loaded, Suite)
    assert len(loaded.workloads("full")) == 30


def test_the_example_of_the_docstring_runs() -> None:
    assert doctest.testmod(workload_module).failed == 0
