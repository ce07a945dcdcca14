"""Which wheel a version number means: looked up in the package index that pip is set to."""

from __future__ import annotations

import ast
import bisect
import os
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import urlsplit, urlunsplit

from attnbench.errors import BackendUnavailableError, InfrastructureError, UsageError
from attnbench.upgrade.versions import normalized

if TYPE_CHECKING:
    import requests
    from packaging.tags import Tag
    from packaging.version import Version
    from pypi_simple import DistributionPackage

DEFAULT_INDEX = "https://pypi.org/simple"

_TIMEOUT_S = 30.0


@dataclass(frozen=True, slots=True)
class Wheel:
    """A wheel on an index. `sha256` is None where the index does not say."""

    filename: str
    url: str
    sha256: str | None


@dataclass(frozen=True, slots=True)
class IndexSettings:
    """What pip is told about its index: the variables PIP_* before its configuration files."""

    urls: tuple[str, ...] = (DEFAULT_INDEX,)
    certificates: str = ""
    proxy: str = ""

    @classmethod
    def read(cls) -> IndexSettings:
        """Ask pip, which reads its files in the right order; only the variables where it is not.

        Indexes that are folders (`file:`) are left out: range requests need a server.
        """
        options = _pip_options()
        main = options.get("index-url", [DEFAULT_INDEX])[0]
        urls = [main, *(url for text in options.get("extra-index-url", ()) for url in text.split())]
        return cls(
            urls=tuple(dict.fromkeys(url for url in urls if url.startswith(("http:", "https:")))),
            certificates=(options.get("cert") or [os.environ.get("SSL_CERT_FILE", "")])[0],
            proxy=(options.get("proxy") or [""])[0],
        )


def _pip_options() -> dict[str, list[str]]:
    asked = subprocess.run(
        [sys.executable, "-m", "pip", "config", "list"],
        capture_output=True,
        text=True,
        check=False,
    )
    found: dict[str, dict[str, str]] = {}
    for line in asked.stdout.splitlines():
        key, equals, value = line.partition("=")
        section, _, option = key.rpartition(".")
        if equals:
            found.setdefault(section, {})[option] = str(ast.literal_eval(value))
    if asked.returncode != 0:
        found[":env:"] = {
            name.removeprefix("PIP_").lower().replace("_", "-"): value
            for name, value in os.environ.items()
            if name.startswith("PIP_")
        }
    # Lowest first, as pip lays them over each other.
    merged: dict[str, list[str]] = {}
    for section in ("global", "install", ":env:"):
        for option, value in found.get(section, {}).items():
            merged[option] = [value]
    return merged


@contextmanager
def open_session(settings: IndexSettings) -> Iterator[requests.Session]:
    """A session that goes through pip's proxy and trusts pip's certificates.

    Raises:
        BackendUnavailableError: the libraries are not installed.
    """
    try:
        import requests
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    with requests.Session() as session:
        if settings.certificates:
            session.verify = settings.certificates
        if settings.proxy:
            session.proxies = {"http": settings.proxy, "https": settings.proxy}
        yield session


def find_wheel(
    distribution: str, version: str, settings: IndexSettings, session: requests.Session
) -> Wheel:
    """The wheel for Linux on x86_64 of this version, else for another Linux.

    Only its Python files are read, so the machine that asks does not matter.

    Raises:
        UsageError: no such distribution or version (the closest ones are named), or no Linux wheel.
        InfrastructureError: the index cannot be reached.
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import InvalidVersion, Version

    packages = _listed(distribution, settings, session)
    wanted = SpecifierSet(f"=={version}")
    of_version = []
    versions: set[Version] = set()
    for package in packages:
        try:
            one = Version(package.version or "")
        except InvalidVersion:
            continue
        versions.add(one)
        if wanted.contains(one, prereleases=True):
            of_version.append(package)
    where = ", ".join(public(url) for url in settings.urls)
    if not of_version:
        near = _closest(Version(version), sorted(versions))
        raise UsageError(
            f"{distribution}=={version}: no such version on {where}; "
            + (f"the closest are {', '.join(near)}" if near else "it has no version at all")
        )
    ranked = sorted(
        ((rank, package) for package in of_version if (rank := _rank(package)) is not None),
        key=lambda pair: pair[0],
    )
    if not ranked:
        names = ", ".join(sorted(package.filename for package in of_version))
        raise UsageError(
            f"{distribution}=={version}: no Linux wheel on {where}, only {names}; give another "
            "version, or a source tree"
        )
    best = ranked[0][1]
    return Wheel(
        filename=best.filename,
        url=best.url,
        sha256=best.digests.get("sha256"),
    )


def _listed(
    distribution: str, settings: IndexSettings, session: requests.Session
) -> list[DistributionPackage]:
    try:
        import pypi_simple
    except ModuleNotFoundError as error:
        raise _not_installed(error) from error
    import requests

    found: list[DistributionPackage] = []
    unknown = 0
    for url in settings.urls:
        client = pypi_simple.PyPISimple(endpoint=url, session=session)
        try:
            page = client.get_project_page(normalized(distribution), timeout=_TIMEOUT_S)
        except pypi_simple.NoSuchProjectError:
            unknown += 1
        except (requests.RequestException, pypi_simple.UnsupportedContentTypeError) as error:
            raise InfrastructureError(
                f"{public(url)}: the package index cannot be read "
                f"({type(error).__name__}: {public(str(error))}); check the network, HTTPS_PROXY "
                "and `pip config list`, or give a wheel file"
            ) from error
        else:
            found += page.packages
    if unknown == len(settings.urls):
        where = ", ".join(public(url) for url in settings.urls)
        raise UsageError(
            f"{distribution}: no such distribution on {where}; check the name, or set the index "
            "with PIP_INDEX_URL"
        )
    return found


def _rank(package: DistributionPackage) -> tuple[object, ...] | None:
    """Lower is better; None for what is no wheel of Linux."""
    from packaging.utils import InvalidWheelFilename, parse_wheel_filename

    try:
        _, version, build, tags = parse_wheel_filename(package.filename)
    except InvalidWheelFilename:
        return None
    kinds = [kind for tag in tags if (kind := _platform(tag)) is not None]
    if not kinds:
        return None
    # Without a local version (+cu129) first, then newest, then the name so that it is always one.
    return (
        package.is_yanked,
        min(kinds),
        version.local is not None,
        [-part for part in build[:1] if isinstance(part, int)],
        package.filename,
    )


def _platform(tag: Tag) -> tuple[int, int] | None:
    if tag.platform == "any":
        place = 0
    elif "linux" not in tag.platform:
        return None
    else:
        place = 0 if tag.platform.endswith("x86_64") else 1
    own = f"cp{sys.version_info.major}{sys.version_info.minor}"
    return place, 0 if tag.abi in ("abi3", "none") else 1 if tag.interpreter == own else 2


def _closest(wanted: Version, known: Sequence[Version]) -> list[str]:
    """The neighbours of `wanted` among sorted versions, and the newest."""
    at = bisect.bisect(known, wanted)
    near = [*known[max(0, at - 2) : at + 2], *known[-1:]]
    return list(dict.fromkeys(str(one) for one in near))


def public(text: str) -> str:
    """An address without the user name and password it may hold."""
    if "@" not in text or "://" not in text:
        return text
    parts = urlsplit(text)
    if parts.username is None and parts.password is None:
        return text
    host = parts.netloc.rpartition("@")[2]
    return urlunsplit(parts._replace(netloc=host))


def _not_installed(error: ModuleNotFoundError) -> BackendUnavailableError:
    return BackendUnavailableError(
        f"version numbers need the package {error.name!r}; install it with "
        "`pip install 'attnbench[upgrade]'`, or give a wheel file, a source tree or --from-python"
    )


def pinned(requires: Sequence[str], distribution: str) -> str | None:
    """The exact version that `Requires-Dist` lines ask for on Linux x86_64; None if not one."""
    from packaging.requirements import Requirement

    linux: Mapping[str, str] = {
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": "x86_64",
        "extra": "",
    }
    for line in requires:
        requirement = Requirement(line)
        if normalized(requirement.name) != distribution:
            continue
        if requirement.marker is not None and not requirement.marker.evaluate(dict(linux)):
            continue
        exact = [one.version for one in requirement.specifier if one.operator == "=="]
        if len(exact) == 1 and not exact[0].endswith(".*"):
            return exact[0]
    return None
