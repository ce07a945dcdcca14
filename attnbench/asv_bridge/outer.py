"""How asv's environments see this environment's libraries, so that torch is never installed again.

asv makes a virtualenv per Python and installs each commit into it with `--no-deps`. A `.pth` file
there names the site-packages of the Python that started asv: everything else is found behind the
commit under test.
"""

from __future__ import annotations

import importlib.metadata
import os
import site
import sys
import sysconfig
from pathlib import Path

#: Read by asv.conf.json's install_command: the outer site-packages, one a line.
OUTER_VARIABLE = "ATTNBENCH_OUTER_SITE_PACKAGES"
#: The file install_command writes into each environment.
PTH_NAME = "attnbench_outer.pth"


def outer_site_packages() -> str:
    """The site-packages folders of this Python, one a line, in import order."""
    folders = [
        sysconfig.get_path("purelib"),
        sysconfig.get_path("platlib"),
        *site.getsitepackages(),
    ]
    if site.ENABLE_USER_SITE:
        folders.append(site.getusersitepackages())
    wanted = {str(Path(folder)) for folder in folders if Path(folder).is_dir()}
    ordered = [entry for entry in dict.fromkeys(sys.path) if entry in wanted]
    return "\n".join([*ordered, *sorted(wanted.difference(ordered))]) + "\n"


def link_environments(env_dir: Path) -> None:
    """Set what install_command reads, and bring environments made from another Python up to date.

    asv's environments outlive the one they were made from: after a switch to another virtualenv
    with another torch they would go on measuring the old one.
    """
    outer = outer_site_packages()
    os.environ[OUTER_VARIABLE] = outer
    for link in env_dir.glob(f"*/lib/python*/site-packages/{PTH_NAME}"):
        if link.read_text(encoding="utf-8") != outer:
            link.write_text(outer, encoding="utf-8")
    _put_first_on_path(Path(sys.executable).parent)


def pin_runner(folder: Path) -> None:
    """Let asv's environments install the asv_runner that this asv was tested with.

    asv asks pip for any version of it. A PIP_CONSTRAINT of the user's own is left alone.
    """
    if "PIP_CONSTRAINT" in os.environ:
        return
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "constraints.txt"
    path.write_text(f"asv_runner=={importlib.metadata.version('asv_runner')}\n", encoding="utf-8")
    os.environ["PIP_CONSTRAINT"] = str(path.resolve())


def _put_first_on_path(folder: Path) -> None:
    """asv looks for `pythonX.Y` on PATH: let it find this environment's first."""
    words = [word for word in os.environ.get("PATH", "").split(os.pathsep) if word]
    if str(folder) not in words[:1]:
        os.environ["PATH"] = os.pathsep.join([str(folder), *words])
