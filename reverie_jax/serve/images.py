"""Images of requests: data URLs, and https from hosts that the operator allows; never a file of this machine."""

from __future__ import annotations

import base64
import binascii
import re
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Collection
from typing import Any

from reverie_jax.serve.errors import ApiError

MAX_IMAGE_BYTES = 20 << 20
"""Size of an image that is downloaded; one in a request is limited by `app.MAX_BODY_BYTES`."""
_TIMEOUT = 20.0
_DATA_URL = re.compile(r"data:([^,;]*)((?:;[^,;]*)*),", re.IGNORECASE)


def read_image(url: str, hosts: Collection[str] = ()) -> bytes:
    """Return the encoded image of a URL.

    Args:
        url: `data:image/...;base64,...`, or https where its host is allowed.
        hosts: Hosts that images may be downloaded from.

    Raises:
        ApiError: It is another URL, or cannot be read.
    """
    if head := _DATA_URL.match(url):
        if not head[2].lower().endswith(";base64"):
            raise _error("a data URL must be encoded in base64: data:image/png;base64,...")
        try:
            # Some clients break lines, or use the alphabet of URLs, or leave the padding out.
            text = re.sub(r"\s", "", urllib.parse.unquote(url[head.end() :])).translate(str.maketrans("-_", "+/"))
            encoded = base64.b64decode(text.rstrip("=") + "=" * (-len(text.rstrip("=")) % 4), validate=True)
        except binascii.Error:
            raise _error("not valid base64") from None
        if not encoded:
            raise _error("an empty image")
        return encoded
    try:
        parts = urllib.parse.urlsplit(url)
        scheme, host = parts.scheme.lower(), (parts.hostname or "").lower()
    except ValueError:
        scheme = host = ""
    if scheme != "https":
        raise _error("must be a data URL (data:image/png;base64,...); files of the server are never read")
    if host not in hosts:
        raise _error(
            f"images are not downloaded from {host or 'this host'}: send a data URL, or start the server with"
            " --image-hosts"
        )
    return _download(url)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Follows no redirect: it would lead to hosts that are not allowed."""

    def redirect_request(self, *args: Any, **kwargs: Any) -> None:
        return None


def _download(url: str) -> bytes:
    try:
        with urllib.request.build_opener(_NoRedirect).open(url, timeout=_TIMEOUT) as response:
            encoded: bytes = response.read(MAX_IMAGE_BYTES + 1)
    except urllib.error.HTTPError as error:
        with error:
            raise _error(f"the image cannot be downloaded (HTTP {error.code})") from None
    except (OSError, ValueError) as error:  # urllib's own are OSErrors
        raise _error(f"the image cannot be downloaded ({type(error).__name__})") from None
    if len(encoded) > MAX_IMAGE_BYTES:
        raise _error(f"the image is larger than {MAX_IMAGE_BYTES >> 20} MiB")
    return encoded


def _error(message: str) -> ApiError:
    return ApiError(400, f"image_url: {message}", param="messages", code="invalid_image_url")
