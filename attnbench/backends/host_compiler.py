"""Whether the host's C or C++ compiler can be called at all."""

from __future__ import annotations

import subprocess
from functools import cache


@cache
def compiler_works(command: str) -> bool:
    """Whether `command --version` ends well. One that is missing or broken compiles nothing."""
    try:
        done = subprocess.run([command, "--version"], capture_output=True, timeout=30, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return False
    return done.returncode == 0
