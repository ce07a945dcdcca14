"""asv's plug-in, named in asv.conf.json as `.attnbench.asv_bridge.plugin`.

The leading dot tells asv that it is a module's full name; without it asv looks among its own.
"""

from __future__ import annotations

import os
import shutil
import sys
from pathlib import Path
from typing import Any

from attnbench.asv_bridge.asv_api import (
    WEB_PAGE,
    WEB_PAGE_ANCHOR,
    OutputPublisher,
    UserError,
    config_argument,
    subcommand,
)
from attnbench.asv_bridge.links import SCRIPT_NAME, write_links
from attnbench.asv_bridge.prepare import find_config, prepare
from attnbench.errors import AttnBenchError, UsageError
from attnbench.settings import load_settings

#: The folder of asv's site our pages are copied to.
FOLDER = "attnbench"

_LINK = (
    f'<li id="nav-li-attnbench"><a href="{FOLDER}/index.html">attnbench pages</a>'
    f'<script defer src="{FOLDER}/assets/{SCRIPT_NAME}"></script></li>\n        '
)


def setup() -> None:
    """asv calls this when the plug-in is loaded, before any command runs."""
    arguments = sys.argv[1:]
    given = config_argument(arguments)
    try:
        # asv works in the folder of its file by now, where a relative path leads nowhere.
        prepare(subcommand(arguments), find_config(Path(given).name if given else None))
    except AttnBenchError as error:
        raise UserError(str(error)) from error


class AttnBenchPages(OutputPublisher):  # type: ignore[misc]
    """Puts the project's dashboard into asv's site, with a link in its head."""

    name = "attnbench"
    button_label = "attnbench pages"
    description = "Latency, throughput and ITL over commits and stacks, backends side by side"
    order = 10

    @classmethod
    def publish(
        cls, conf: Any, repo: object, benchmarks: object, graphs: object, revisions: object
    ) -> None:
        """asv has put its site into `conf.html_dir` and works in the folder of asv.conf.json."""
        try:
            add_pages(Path(os.path.abspath(load_settings().site)), Path(conf.html_dir))
        except AttnBenchError as error:
            raise UserError(str(error)) from error


def add_pages(site: Path, html_dir: Path) -> bool:
    """Copy the rendered pages of `site` into asv's `html_dir` and link them; False: there are none.

    Raises UsageError when asv's page is not as expected.
    """
    if not (site / "index.html").is_file():
        print(
            f"attnbench: no pages in {site}; render them first: attnbench dashboard",
            file=sys.stderr,
        )
        return False
    page = html_dir / WEB_PAGE
    text = page.read_text(encoding="utf-8")
    if WEB_PAGE_ANCHOR not in text:
        raise UsageError(
            f"{page} has no {WEB_PAGE_ANCHOR!r}: this asv is not one attnbench knows; "
            "install asv==0.6.6"
        )
    shutil.copytree(site, html_dir / FOLDER, dirs_exist_ok=True)
    write_links(html_dir, html_dir / FOLDER)
    if _LINK not in text:
        page.write_text(text.replace(WEB_PAGE_ANCHOR, _LINK + WEB_PAGE_ANCHOR), encoding="utf-8")
    return True
