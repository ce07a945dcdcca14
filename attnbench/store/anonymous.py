"""Text without the names of machines, GPUs, people and folders in it.

A name in a column of its own becomes a hash with a secret salt. A plain hash would hide nothing:
`gpu01` and every user name are guessed and hashed in seconds, and hashing slowly only buys minutes.
With 256 random bits in the hash, nobody who lacks the salt can test a guess. In running text a name
becomes a word that says what stood there, so that no sentence ties a hash to a meaning.
"""

from __future__ import annotations

import getpass
import hashlib
import re
import socket
from collections.abc import Iterable
from pathlib import Path

#: What a hashed name of each kind looks like.
HOST = re.compile(r"host-[0-9a-f]{16}")
GPU = re.compile(r"gpu-[0-9a-f]{16}")

#: Accounts and machines that are everybody's.
_NOBODY = frozenset({"", "root", "localhost"})

#: Letters from which on a name is looked for within words, too.
_LONG = 6

_UUID = r"(?:(?:GPU|MIG)-)*[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}"

# A path starts where no word, number or closing bracket stands before it: `32/8`, `tokens/s` and
# `vllm/model.py` are none. It ends at white space, a quote or the punctuation of the sentence.
_START = r"(?:(?<![\w.~)\]}>/-])|(?<=-[ILB])|(?<=-isystem))"
_CHAR = r"(?:\\.|(?<=\w)'(?=\w)|[^\s'\"`<>|\\])"
_TAIL = rf"{_CHAR}*(?:\\.|[^\s'\"`<>|\\.,;:)\]}}!?])"
_PATH = (
    rf"file://{_TAIL}"
    rf"|{_START}(?:~(?:[A-Za-z_][\w.-]*)?/|(?<!:)//|[A-Za-z]:[\\/](?![\\/])){_TAIL}"
    rf"|{_START}/(?![/\s]){_CHAR}{_TAIL}"
    rf"|/(?:home|Users)/{_TAIL}"  # wherever it stands
)
#: A path in quotes may hold white space; nothing but the quote ends it.
_QUOTED = r"(?P<quote>['\"`])(?=(?:file://)?(?:/|~[\w.-]*/|[A-Za-z]:[\\/])(?!(?P=quote)))(?:\\.|(?!(?P=quote)).)*(?P=quote)"
_LOGIN = r"(?<=://)[^/\s@]+@"  # of a URL
_ADDRESS = r"\b[\w.+-]+@[A-Za-z][\w.-]*"

_ARGUMENT = re.compile(r"((?:--?[\w-]+=)?)(?:file://|/|~|[A-Za-z]:[\\/]).")

_PRIVATE = re.compile(rf"{_QUOTED}|{_PATH}|{_UUID}", re.IGNORECASE)


class Anonymizer:
    """Takes out the names it was told, and everything that looks like a path, UUID or address.

    Args:
        salt: secret, of 16 bytes or more.
        hosts: names of machines, short or with their domain.
        users: names of accounts.
        homes: home folders, whose names may hold white space.
        gpus: ids of GPUs in whatever form.
    """

    def __init__(
        self,
        salt: bytes,
        hosts: Iterable[str] = (),
        users: Iterable[str] = (),
        homes: Iterable[str] = (),
        gpus: Iterable[str] = (),
    ) -> None:
        self._salt = salt
        self._hosts = _words({part for name in hosts for part in _parts(name)})
        self._users = _words(users)
        self._gpus = _words(gpus)
        folders = sorted((re.escape(h) for h in homes if h.count("/") > 1), key=len, reverse=True)
        home = rf"(?:{'|'.join(folders)})(?:/{_CHAR}*)?" if folders else r"(?!)"
        # One pass, so that no word put in is taken for one to take out.
        self._text = re.compile(
            rf"(?P<quoted>{_QUOTED})|(?P<login>{_LOGIN})|(?P<path>{home}|{_PATH})"
            rf"|(?P<gpu>{self._gpus}|{_UUID})|(?P<address>{_ADDRESS})"
            rf"|(?P<host>{self._hosts})|(?P<user>{self._users})",
            re.IGNORECASE,
        )
        self._named = re.compile(rf"{self._gpus}|{self._hosts}|{self._users}", re.IGNORECASE)

    def host(self, name: str) -> str:
        """`host-` and 16 digits, the same for the same machine; "" stays."""
        return name and f"host-{self._hash('host', name.lower())}"

    def gpu(self, uuid: str) -> str:
        """`gpu-` and 16 digits, however the id is written; "" stays."""
        plain = re.sub(r"^(?:(?:GPU|MIG)-)+", "", uuid, flags=re.IGNORECASE)
        return uuid and f"gpu-{self._hash('gpu', plain.lower())}"

    def text(self, text: str) -> str:
        """`text` with what identifies anybody replaced."""
        return self._text.sub(self._replace, text)

    def argument(self, argument: str) -> str:
        """One word of a command line: a path in it ends where the word ends."""
        found = _ARGUMENT.match(argument)
        return f"{found[1]}<path>" if found else self.text(argument)

    def betrays(self, text: str, named: bool) -> bool:
        """Whether a path or UUID is in `text`; with `named`, or a name it was told."""
        return bool(_PRIVATE.search(text) or (named and self._named.search(text)))

    def _replace(self, match: re.Match[str]) -> str:
        kind = match.lastgroup if match.lastgroup != "quote" else "quoted"
        if kind == "quoted":
            return f"{match['quote']}<path>{match['quote']}"
        if kind == "gpu":
            return self.gpu(match[0])
        if kind == "address":
            return "<user>@<host>"
        if kind == "login":
            return "<user>@"
        return f"<{kind}>"

    def _hash(self, kind: str, name: str) -> str:
        return hashlib.blake2b(
            name.encode(), key=self._salt[:64], person=kind.encode(), digest_size=8
        ).hexdigest()


def _parts(host: str) -> tuple[str, ...]:
    """`node.corp.example`, `node` and `corp.example`; the last only if it names somebody."""
    short, _, domain = host.partition(".")
    return (host, short, domain) if "." in domain else (host, short)


def _words(names: Iterable[str]) -> str:
    """A pattern of any of `names`, longest first; of none, one that never matches.

    A short one is only found as a word of its own; no other word holds a long one by chance.
    """
    known = sorted({n for n in names if n.lower() not in _NOBODY}, key=lambda n: (-len(n), n))
    if not known:
        return r"(?!)"
    return "|".join(
        re.escape(name)
        if len(name) >= _LONG
        else rf"(?<![A-Za-z0-9]){re.escape(name)}(?![A-Za-z0-9])"
        for name in known
    )


def names_here() -> tuple[set[str], set[str], set[str]]:
    """The hosts, users and home folders this process knows of itself."""
    users = set()
    homes = set()
    try:
        home = Path.home()
        homes.add(str(home))
        users.add(home.name)
        users.add(getpass.getuser())
    except (OSError, KeyError, RuntimeError):  # an account without an entry
        pass
    return {socket.gethostname()}, users, homes


def users_in(texts: Iterable[str]) -> set[str]:
    """Names of accounts, as paths of home folders in `texts` tell them."""
    found = (re.findall(r"/(?:home|Users)/([^/\s'\"`:,;)]+)", text) for text in texts)
    return {name for names in found for name in names}
