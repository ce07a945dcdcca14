"""`BackendFamily`: one registered name behind which a library's own backends are found by theirs.

`VLLM` is one: `VLLM:TRITON_ATTN` is a backend of its own, made when it is asked for. A family is
never run itself, and nothing of it runs unless it was asked for by name.
"""

from __future__ import annotations

from abc import abstractmethod

from attnbench.backends.abstract import AttentionBackend, AttentionConfig
from attnbench.backends.device import Device


class BackendFamily(AttentionBackend):
    """Names backends instead of being one."""

    @classmethod
    @abstractmethod
    def get_members(cls) -> tuple[str, ...]:
        """Names of the backends, empty when the library is absent. Imports nothing."""

    @classmethod
    @abstractmethod
    def get_member(cls, name: str) -> type[AttentionBackend]:
        """The backend `FAMILY:name`. Imports nothing.

        Raises: UnknownBackendError when the library is here and has no such backend.
        """

    @classmethod
    def get_variants(cls, device: Device) -> tuple[str, ...]:
        """The members: `FAMILY:member` is how one is asked for."""
        return cls.get_members() or ("",)

    @classmethod
    def mend(cls) -> str:
        """What to type instead of the family's own name."""
        members = cls.get_members()
        example = f", e.g. {cls.get_name()}:{members[0]}" if members else ""
        return (
            f"{cls.get_name()} stands for many backends; ask for {cls.get_name()}:NAME{example}; "
            "`attnbench backends` lists them"
        )

    @classmethod
    def validate_configuration(cls, config: AttentionConfig, device: Device) -> list[str]:
        return [cls.mend()]
