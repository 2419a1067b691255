"""`reverie serve`."""

from __future__ import annotations

import dataclasses
from pathlib import PurePath
from typing import Annotated

from tyro.conf import Positional

from reverie_jax.cli import common, listening
from reverie_jax.errors import UserError

_MAX_NEW_TOKENS = 512
_GRACE_SECONDS = 30
"""How long requests may go on after Ctrl-C or SIGTERM."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Serve:
    """Serve a model to clients of OpenAI's chat completions API, with images.

    Requests about one image share its prefix. A key in the environment variable REVERIE_API_KEY is asked of all clients.
    """

    model: Annotated[Positional[str], common.option("MODEL")]
    """Checkpoint: a folder or hub id in any format that `reverie convert` reads, or scenes-base."""
    components: common.Components = ()
    adapter: common.Adapter = None
    template: common.Template = None
    dtype: common.Dtype = "auto"
    mesh: common.MeshSpec = common.ONE_DEVICE
    host: listening.Host = "127.0.0.1"
    port: listening.Port = 8000
    served_model_name: Annotated[str, common.option("NAME")] = ""
    """Name of the model for clients; the last part of MODEL if omitted."""
    batch_size: Annotated[int, common.N] = 16
    """Images in a batch."""
    max_requests: Annotated[int, common.N] = 256
    """Requests at once, those that wait included; more are refused with status 429."""
    max_new_tokens: common.MaxNewTokens = None
    """Maximum length of an answer, in tokens; requests may set their own. 512 if omitted."""
    image_hosts: Annotated[common.Several[str], common.option("HOST ...")] = ()
    """Hosts that images may be downloaded from by https; none if omitted."""

    def run(self) -> None:
        """Run the command."""
        common.check_at_least(
            1, batch_size=self.batch_size, max_requests=self.max_requests, max_new_tokens=self.max_new_tokens
        )
        template, key = common.check_template(self.template), listening.find_key(self.host, self.port)
        try:
            import uvicorn

            from reverie_jax.serve.app import Service, make_app
        except ImportError as error:
            raise UserError(f"`reverie serve`: {error}; pip install -e '.[web]' in the checkout") from None
        from reverie_jax.eval.engine import Engine
        from reverie_jax.eval.schedule import EngineShape
        from reverie_jax.serve.scheduler import Scheduler

        mesh = common.parse_mesh(self.mesh)
        with listening.open_socket(self.host, self.port) as opened:
            model, processor = common.load_merged(self.model, self.components, self.adapter, self.dtype, template)
            shape = EngineShape(sequence_length=processor.context, batch_size=self.batch_size)
            service = Service(
                Scheduler(Engine(model, processor, shape, mesh=mesh)),
                self.served_model_name or PurePath(self.model.partition("@")[0]).name,
                key,
                self.max_new_tokens or _MAX_NEW_TOKENS,
                self.max_requests,
                frozenset(host.lower() for host in common.joined(self.image_hosts)),
            )
            app = make_app(service)
            config = uvicorn.Config(
                app, log_level="warning", ws="none", timeout_keep_alive=75, timeout_graceful_shutdown=_GRACE_SECONDS
            )
            common.note([f"serving {service.name} at {listening.address(opened)}/v1"])
            uvicorn.Server(config).run([opened])
