"""Identity of a request: two requests with one identity are sent once."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Mapping

from reverie_jax.hosted.interface import Request, digest


def digest_bytes(encoded: bytes) -> str:
    """Return 32 hexadecimal digits of the SHA-256 of a file's bytes."""
    return hashlib.sha256(encoded).hexdigest()[:32]


def content_digest(stage: str, image: str, fields: Mapping[str, str]) -> str:
    """Return the digest of a request's content: stage, digest of the image's bytes, fields; not model or prompt."""
    return digest(stage, image, dict(fields))


def request_digest(request: Request) -> str:
    """Return the digest of a request's content (see `content_digest`)."""
    return content_digest(request.stage, digest_bytes(request.image.encoded), request.fields)


@dataclasses.dataclass(frozen=True)
class RequestIdentity:
    """Identity of a request: content, provider, model, prompt version.

    Attributes:
        content: Digest by `content_digest`; the same for all models and prompts.
        prompt: Version of the prompt and of the settings that change a reply.
    """

    stage: str
    content: str
    provider: str
    model: str
    prompt: str

    @property
    def key(self) -> str:
        """The identity as one digest."""
        return digest(self.content, self.provider, self.model, self.prompt)
