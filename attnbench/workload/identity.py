"""How an identity is made from text."""

from __future__ import annotations

import hashlib


def short_hash(*parts: str) -> str:
    """16 hex digits that identify `parts` (SHA-256 over their length-prefixed UTF-8)."""
    digest = hashlib.sha256()
    for part in parts:
        data = part.encode()
        digest.update(f"{len(data)}:".encode())
        digest.update(data)
    return digest.hexdigest()[:16]
