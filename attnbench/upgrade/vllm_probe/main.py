"""One process: a request on the first line of stdin, the answers as JSON in a file.

Request: `{"capability": [9, 0] | null, "paths": [...], "stubs": bool, "facts": {NAME: bool},
"tools": FOLDER, "cases": [...], "settings": [...], "environment": {NAME: VALUE}, "answer": FILE}`.
The settings are looked at one by one (settings.py), the environment holds while the cases are
asked. A null capability asks the CPU's platform.
`stubs: false` asks the installed vLLM on the device it runs on. `tools` is an empty folder.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import sys
import time
import traceback
from pathlib import Path
from typing import Any

from . import stubs
from .facts import Facts
from .observe import Observer


def main() -> int:
    """Answer the request; exit 0 also when single cases could not be evaluated."""
    request = json.loads(sys.stdin.readline())
    started = time.perf_counter()
    answer: dict[str, Any] = {}
    try:
        answer = _answer(request)
    except BaseException as error:  # the parent process says it in its own words
        answer = {
            "failed": f"{type(error).__name__}: {error}",
            "module": getattr(error, "name", None) if isinstance(error, ImportError) else None,
            "traceback": traceback.format_exc(),
        }
        if isinstance(error, KeyboardInterrupt):
            raise
    answer["duration_s"] = time.perf_counter() - started
    target = Path(request["answer"])
    part = target.with_suffix(".part")
    part.write_text(json.dumps(answer), encoding="utf-8")
    part.replace(target)
    return 0


def _answer(request: dict[str, Any]) -> dict[str, Any]:
    for path in reversed(request["paths"]):
        sys.path.insert(0, path)
    capability = request["capability"]
    _environment(request)
    connections: list[str] = []
    observer = Observer(connections)
    finder = stubs.StubFinder()
    if request["stubs"]:
        stubs.cut_network(connections)
        _stand_ins(finder, request)
    facts = Facts(finder, request["facts"] if request["stubs"] else {}, Path(request["tools"]))
    stubs.install(finder)
    observer.install()
    if request["stubs"] and capability is not None:
        import torch  # noqa: F401

        stubs.pretend_cuda((capability[0], capability[1]))
    import vllm
    import vllm.platforms

    if capability is None and request["stubs"]:
        from vllm.platforms.cpu import CpuPlatform

        vllm.platforms._current_platform = CpuPlatform()
    platform = vllm.platforms.current_platform

    from .cases import Evaluator
    from .settings import Examiner

    _check_api()
    examiner = Examiner()
    evaluator = Evaluator(observer, facts)
    return {
        "vllm": importlib.metadata.version("vllm"),
        "vllm_file": str(vllm.__file__),
        "platform": f"{type(platform).__module__}.{type(platform).__qualname__}",
        "capability": _capability(platform),
        "python": sys.version.split()[0],
        "packages": _packages(),
        "requires": importlib.metadata.requires("vllm") or [],
        "registered": _registered(),
        "default_block_size": _default_block_size(),
        "answers": [_guarded(evaluator, case) for case in request["cases"]],
        "settings": [examiner.examine(one) for one in request.get("settings", ())],
        "stubs": sorted(finder.used),
    }


def _guarded(evaluator: Any, case: dict[str, Any]) -> dict[str, Any]:
    try:
        answer: dict[str, Any] = evaluator.evaluate(case)
    except Exception as error:  # one case must not take the others with it
        where = traceback.extract_tb(error.__traceback__)[-1]
        text = f"{type(error).__name__}: {error} ({Path(where.filename).name}:{where.lineno})"
        answer = {"case_id": case["case_id"], "not_evaluated": [f"selection: {text}"]}
    return answer


def _environment(request: dict[str, Any]) -> None:
    # What is set where attnbench runs says nothing about the server that is asked about.
    for name in [one for one in os.environ if one.startswith("VLLM_")]:
        del os.environ[name]
    os.environ.update(request.get("environment", {}))
    os.environ["VLLM_LOGGING_LEVEL"] = "ERROR"
    os.environ["VLLM_NO_USAGE_STATS"] = "1"
    os.environ["VLLM_PLUGINS"] = ""
    os.environ["HF_HUB_OFFLINE"] = "1"
    if request["stubs"]:
        # An nvcc of this machine says nothing about the host that is asked about.
        os.environ["CUDA_HOME"] = request["tools"]
        path = os.environ.get("PATH", "")
        kept = [
            one
            for one in path.split(os.pathsep)
            if not (Path(one) / "nvcc").exists() and not (Path(one) / "ninja").exists()
        ]
        os.environ["PATH"] = os.pathsep.join([f"{request['tools']}/bin", *kept])


def _stand_ins(finder: stubs.StubFinder, request: dict[str, Any]) -> None:
    for path in request["paths"]:
        for name in stubs.extension_modules(Path(path)):
            finder.add(name)
    capability = request["capability"]
    if capability is not None:
        pair = (capability[0], capability[1])
        for name in ("vllm.third_party.pynvml", "pynvml"):
            finder.add(name, lambda: stubs.fake_nvml(pair))


def _check_api() -> None:
    """Say which of the selector's entry points this version lacks, before any case is asked."""
    import vllm.v1.attention.backends.registry as registry
    import vllm.v1.attention.selector as selector

    missing = [
        f"{module.__name__}.{name}"
        for module, name in (
            (selector, "get_attn_backend"),
            (selector, "AttentionSelectorConfig"),
            (registry, "AttentionBackendEnum"),
        )
        if not hasattr(module, name)
    ]
    if missing:
        raise NotImplementedError("this vLLM has no " + ", ".join(missing))


def _registered() -> list[str]:
    from vllm.v1.attention.backends.registry import AttentionBackendEnum

    return [str(member.name) for member in AttentionBackendEnum]


def _default_block_size() -> int:
    from vllm.config.cache import CacheConfig

    return int(CacheConfig.DEFAULT_BLOCK_SIZE)


def _capability(platform: Any) -> list[int] | None:
    try:
        capability = platform.get_device_capability()
    except NotImplementedError:
        return None
    return None if capability is None else [capability.major, capability.minor]


def _packages() -> dict[str, str]:
    found = {}
    for name in ("torch", "triton", "flashinfer-python", "flashinfer-cubin", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found
