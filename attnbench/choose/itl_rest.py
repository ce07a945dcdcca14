"""The rest of a step from stored steps of a model: which rows may stand together.

Steps and their attention are of one backend, and of one device class, protocol, timer, L2 state,
execution and driver, those of the answer. One backend's rest is everybody's: it is the same work,
and the differences of noisy times of each would be called differences of backends.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from shlex import quote

from attnbench.choose.report import REPLICATES
from attnbench.choose.stored import MOST_NOISY, Measured, used_replicates
from attnbench.choose.tries import BATCH, Choice, How, Try, layer_key
from attnbench.errors import UsageError
from attnbench.store.record import PROTOCOL_VERSION, Status
from attnbench.traffic.latency_rest import MeasuredRest, StepTimes
from attnbench.traffic.model_sizes import Model
from attnbench.workload import Workload

#: Batches from one token to vLLM's largest step; contexts are attention's and make no difference.
STEP_BATCHES = "{q1s1k,8q1s1k,32q1s1k,128q1s1k,512q1s1k,q1k,q2k,q4k,q8k}"

#: Of a layer's text, what the model does not say.
_SPEC_WORDS = ("dtype", "kv", "block", "layout")


@dataclass(frozen=True, slots=True)
class Rest:
    """The rest of a step, and whose steps it is from."""

    model: MeasuredRest
    choice: Choice
    how: How

    @property
    def text(self) -> str:
        """For people: `measured steps of FLASH_ATTN:FA3, 9 batches of 1 to 8192 tokens`."""
        tokens = self.model.tokens
        return (
            f"measured steps of {self.choice.text}, {len(self.model.times)} batches of "
            f"{tokens[0]:.0f} to {tokens[-1]:.0f} tokens"
        )


def measured_rest(
    steps: Iterable[Try],
    attention: Sequence[Try],
    layer: Workload,
    model: Model,
    measured: Measured,
    published: Iterable[str],
    command: str,
) -> Rest:
    """The rest of a step of `model` around `layer`.

    Args:
        steps, attention: tries of the metrics `step` and `attention`.
        measured: what the answer is from: its steps must have been measured alike.
        command: what measures the steps, for a message.

    Raises:
        UsageError: nothing stored that fits, or what `MeasuredRest` says.
    """
    hidden = frozenset(published)
    device_class = measured.device_class
    wanted = layer_key(layer.columns())
    mine: dict[Choice, dict[How, list[Try]]] = defaultdict(lambda: defaultdict(list))
    for one in steps:
        what = one.what
        if (
            what.how.device_class == device_class
            and what.protocol_version == PROTOCOL_VERSION
            and one.run_id not in hidden
            and what.layer == wanted
            and Workload.parse(what.workload).model == model.sizes.text
        ):
            mine[what.choice][what.how].append(one)
    found: list[Rest] = []
    refused: list[str] = []
    for choice, by_how in mine.items():
        for how, tries in by_how.items():
            if measured.how not in (None, how):
                refused.append(f"{choice.text}: measured otherwise than attention, {how.text}")
                continue
            times, why = _times(choice, how, tries, attention, device_class, hidden)
            try:
                found.append(Rest(MeasuredRest(times, model.num_layers), choice, how))
            except UsageError as error:
                refused.append(f"{choice.text}: {'; '.join([*why, str(error)])}")
    if not found:
        said = f" ({'; '.join(dict.fromkeys(refused))})" if refused else ""
        raise UsageError(
            f"--rest measured: no stored steps of this model on {device_class} fit{said}; measure "
            f"them: {command}"
        )
    return max(found, key=lambda one: (len(one.model.tokens), len(one.model.times), one.how))


def _times(
    choice: Choice,
    how: How,
    tries: Sequence[Try],
    attention: Sequence[Try],
    device_class: str,
    hidden: frozenset[str],
) -> tuple[list[StepTimes], list[str]]:
    """Batches with steps and attention, and why others are none."""
    newest: dict[tuple[Workload, int], Try] = {}
    for one in sorted(tries, key=lambda tried: tried.age):
        workload = Workload.parse(one.what.workload)
        newest[workload.attention, workload.shape.num_layers] = one
    timed: dict[Workload, dict[int, list[float]]] = defaultdict(dict)
    why: dict[str, None] = {}
    for (workload, layers), last in newest.items():
        replicates, noisy, status = used_replicates(last)
        if noisy > MOST_NOISY * len(replicates):
            status = Status.NOISY
        if status is not Status.OK:
            why[f"a step ended as {status}"] = None
            continue
        timed[workload][layers] = replicates
    alone = Measured(attention, device_class, list(timed), hidden)
    found = []
    for workload, steps in timed.items():
        attended = alone.point(workload).timed.get(choice) if alone.how == how else None
        if attended is None:
            why["attention of a batch by itself has no time of the same kind"] = None
            continue
        key = " ".join(str(workload.columns()[name]) for name in BATCH[:1])
        found.append(StepTimes(key, workload.num_tokens, steps, attended.replicates))
    return found, list(why)


def step_command(
    model: str, tensor_parallel_size: int, layer: Workload, backend: str, run_words: str
) -> str:
    """What measures the steps that `--rest measured` needs, and their attention."""
    words = [word for word in layer.text.split()[1:] if word.partition("=")[0] in _SPEC_WORDS]
    command = ["attnbench", "run", quote(" ".join([STEP_BATCHES, *words]))]
    command += ["--metric", "step", "--model", quote(model)]
    command += ["--tp", str(tensor_parallel_size)] if tensor_parallel_size != 1 else []
    command += ["--backend", quote(backend)] if backend else []
    return " ".join([*command, "--replicates", str(REPLICATES)]) + run_words
