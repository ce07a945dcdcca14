"""The command as a user types it."""

from __future__ import annotations

from tests.cli.conftest import attnbench as attnbench
from tests.cli.conftest import project as project
