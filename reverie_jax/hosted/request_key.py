"""What makes two requests the same."""

from __future__ import annotations

import hashlib

from reverie_jax.hosted.interface import Request, digest


def content(request: Request) -> str:
    """Digest of what is asked: stage, the picture's bytes, the fields; neither whom nor in which words."""
    return content_of(request.stage, hashlib.sha256(request.picture.encoded).hexdigest()[:32], dict(request.fields))


def content_of(stage: str, picture: str, fields: dict[str, str]) -> str:
    """The same from the digest of a picture's bytes."""
    return digest(stage, picture, fields)
