"""Images by https: from allowed hosts only, over a real TLS connection to loopback."""

from __future__ import annotations

import http.server
import ssl
import subprocess
import threading

import pytest

from reverie_jax.serve import images
from reverie_jax.serve.errors import ApiError
from reverie_jax.serve.images import read_image

CONTENT = {"/a.png": b"picture", "/large": b"x" * 3_000}


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "/a.png")
            self.end_headers()
        elif self.path in CONTENT:
            self.send_response(200)
            self.end_headers()
            self.wfile.write(CONTENT[self.path])
        else:
            self.send_error(404)

    def log_message(self, *args):
        pass


@pytest.fixture(scope="module")
def address(tmp_path_factory):
    """Address of a server with a certificate of its own, which is trusted in this process."""
    folder = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "cert.pem"
    words = ["openssl", "req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2", "-subj", "/CN=localhost"]
    words += ["-addext", "subjectAltName=DNS:localhost", "-keyout", str(key), "-out", str(certificate)]
    try:
        subprocess.run(words, check=True, capture_output=True)
    except FileNotFoundError:
        pytest.skip("openssl is not installed")
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificate, key)
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server, pytest.MonkeyPatch.context() as patch:
        server.socket = context.wrap_socket(server.socket, server_side=True)
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        patch.setenv("SSL_CERT_FILE", str(certificate))
        patch.setenv("NO_PROXY", "localhost")
        patch.setenv("no_proxy", "localhost")
        yield f"https://localhost:{server.server_port}"
        server.shutdown()
        thread.join()


def test_an_allowed_host(address):
    assert read_image(f"{address}/a.png", {"localhost"}) == b"picture"


@pytest.mark.parametrize(
    ("path", "hosts", "named"),
    [
        ("/a.png", {"example.org"}, "localhost"),
        ("/a.png", (), "localhost"),
        ("/none", {"localhost"}, "404"),
        ("/moved", {"localhost"}, "302"),
        ("/large", {"localhost"}, "larger"),
    ],
)
def test_what_is_not_downloaded(address, path, hosts, named, monkeypatch):
    monkeypatch.setattr(images, "MAX_IMAGE_BYTES", 2_000)
    with pytest.raises(ApiError, match=named) as error:
        read_image(f"{address}{path}", hosts)
    assert (error.value.status, error.value.code) == (400, "invalid_image_url")


def test_a_certificate_that_is_not_trusted(address, monkeypatch):
    monkeypatch.delenv("SSL_CERT_FILE")
    with pytest.raises(ApiError, match="URLError"):
        read_image(f"{address}/a.png", {"localhost"})
