"""What commands that listen share: address, port, key."""

from __future__ import annotations

import ipaddress
import os
import socket
from typing import Annotated

from reverie_jax.cli import common
from reverie_jax.errors import UserError

KEY = "REVERIE_API_KEY"
Host = Annotated[str, common.option("ADDRESS", f"Address to listen at; any but loopback needs a key in {KEY}.")]
Port = Annotated[int, common.option("N", "Port to listen at; 0 for any free one.")]


def find_key(host: str, port: int) -> str:
    """Return the key that clients must show; empty for none.

    Raises:
        UserError: The key is missing and the address is not loopback, or the port is not from 0 to 65535.
    """
    from reverie_jax.hosted.providers.common import find_api_key

    if not 0 <= port <= 65535:
        raise UserError(f"--port {port}: must be from 0 to 65535")
    key = find_api_key(os.environ, KEY, required=False)
    if not key and not _is_loopback(host):
        raise UserError(f"--host {host}: others could connect; set the environment variable {KEY}")
    return key


def _is_loopback(host: str) -> bool:
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def open_socket(host: str, port: int) -> socket.socket:
    """Return the socket, before anything is loaded; clients that come early wait.

    Raises:
        UserError: The address cannot be used.
    """
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        raise UserError(f"--host {host} --port {port}: cannot listen there ({error.strerror or error})") from None


def address(opened: socket.socket) -> str:
    """Return the URL of a socket."""
    host, port = opened.getsockname()[:2]
    return f"http://{f'[{host}]' if ':' in host else host}:{port}"
