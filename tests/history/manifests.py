"""Made-up stacks, and git as the tests of the manifest repository use it."""

from __future__ import annotations

import os
import subprocess
from datetime import UTC, datetime, timedelta
from pathlib import Path

from attnbench.history.stacks import Stack
from attnbench.store.record import stack_id

START = datetime(2026, 11, 1, 2, tzinfo=UTC)


def made(day: float, *packages: str, device: str = "h200", driver: str = "580.1") -> Stack:
    listed = tuple(sorted(packages or ("python==3.11.7", f"torch==2.{day:g}.0")))
    return Stack(
        device_class=device,
        stack_id=stack_id(listed),
        packages=listed,
        driver_version=driver,
        cuda_version="13.0",
        container_digest="sha256:0123",
        first_measured=START + timedelta(days=day),
    )


def git(folder: Path, *words: str) -> str:
    names = {
        f"GIT_{who}_{what}": "me@here"
        for who in ("AUTHOR", "COMMITTER")
        for what in ("NAME", "EMAIL")
    }
    done = subprocess.run(
        ["git", "-C", str(folder), *words],
        env=os.environ | names,
        capture_output=True,
        text=True,
        check=True,
    )
    return done.stdout.strip()


def state(folder: Path) -> tuple[str, str]:
    return git(folder, "rev-parse", "HEAD"), git(folder, "status", "--porcelain")
