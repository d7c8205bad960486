"""`nabla-fast serve`: an OpenAI-compatible server."""

from __future__ import annotations

import os
import signal
import socket
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nabla_fast.cli import console
from nabla_fast.cli.models import ModelChoice, chosen_models
from nabla_fast.cli.options import configured, with_shared_options
from nabla_fast.config import require_api_key, require_int, require_number
from nabla_fast.stopping import kept_handlers

if TYPE_CHECKING:
    from nabla_fast.config import NablaConfig
    from nabla_fast.server.engine import Engine
    from nabla_fast.server.protocol import Served

API_KEY_VARIABLE = "NABLA_FAST_API_KEY"
_LIBRARIES = ("fastapi", "prometheus_client", "uvicorn")
_LONGEST = 86400.0
_server = partial(typer.Option, rich_help_panel="Server")


@with_shared_options
def command(
    host: Annotated[str, _server(help="Address to listen at; 0.0.0.0 is every network.")] = "127.0.0.1",
    port: Annotated[int, _server(help="Port to listen at; 0 takes a free one.")] = 8000,
    served_name: Annotated[
        str | None, _server(help="The model's name in requests. Default: the pair's, or the model's folder.")
    ] = None,
    api_key: Annotated[
        str | None,
        _server(help=f"Key that requests must send. Default: the environment variable {API_KEY_VARIABLE}, or none."),
    ] = None,
    max_queue: Annotated[
        int, _server(help="Most requests that wait while --max-batch-size sequences are decoded; others get a 429.")
    ] = 64,
    timeout: Annotated[float, _server(help="Seconds that a request may take, from its arrival.")] = 600.0,
    drain: Annotated[float, _server(help="Seconds that requests under way get to end at SIGTERM or Ctrl-C.")] = 30.0,
    **settings: Any,
) -> None:
    """Serves the models to OpenAI's clients: chat completions and completions, refined by ∇-Reasoner."""
    missing = [library for library in _LIBRARIES if find_spec(library) is None]
    if missing:
        raise ImportError(
            f'serve needs {", ".join(missing)}, which is not installed; use pip install "nabla_fast[serve]"'
        )
    choice = chosen_models(settings)
    choice.require()
    config = configured(choice.config, settings)
    require_int("--max-queue", max_queue, minimum=0)
    require_number("--timeout", timeout, minimum=0.0, maximum=_LONGEST, open_minimum=True)
    require_number("--drain", drain, minimum=0.0, maximum=_LONGEST)
    key = os.environ.get(API_KEY_VARIABLE) or None if api_key is None else api_key
    if key is not None:
        require_api_key("--api-key" if api_key is not None else API_KEY_VARIABLE, key)
    name = _served_name(served_name, choice)
    # Before the models, for which a mistake should not have to wait.
    with _bound(host, port) as listening:
        engine, served = _started(choice, config, name, max_queue, seeded=settings["seed"] is not None)
        try:
            _serve(engine, served, listening, key, timeout, drain)
        finally:
            engine.close()
    if engine.alive:
        # In a step that cannot be given up. Python would take its thread down in the middle of it, and crash.
        sys.stderr.flush()
        os._exit(0)


def _served_name(given: str | None, choice: ModelChoice) -> str:
    name = given if given is not None else choice.pair or Path(str(choice.model)).resolve().name
    if not name or not name.isprintable() or name != name.strip("/ "):
        raise ValueError(f"--served-name is {name!r}; give a name without a slash or a space at its ends")
    return name


def _bound(host: str, port: int) -> socket.socket:
    """A socket that is bound and does not listen yet, so that clients are not kept waiting for the models."""
    require_int("--port", port, minimum=0, maximum=65535)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except OSError as error:
        raise ValueError(f"--host is {host!r}, which is no address of this machine ({error})") from error
    bound = socket.socket(family, kind, protocol)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind(address)
    except OSError as error:
        bound.close()
        raise ValueError(
            f"--port is {port}, and {host} does not give it ({error.strerror}); give another one"
        ) from error
    return bound


def _started(
    choice: ModelChoice, config: NablaConfig, name: str, max_queue: int, *, seeded: bool
) -> tuple[Engine, Served]:
    """The models, loaded and checked, in an engine; and what requests may say."""
    with console.status("loading the models"):
        from nabla_fast import ops
        from nabla_fast.generate import make_pair
        from nabla_fast.models.chat import Chat
        from nabla_fast.server.engine import Engine
        from nabla_fast.server.protocol import Served

        pair = make_pair(*choice.load(), config)
        ops.resolve("relaxed_stats", config.backend, pair.language_model.device.type)
        demo = choice.demo

        def check(chat: Chat) -> None:
            if demo is not None:
                demo.require([chat])

        return Engine(pair, config, max_queue), Served(name, config, seeded, check)


def _serve(
    engine: Engine, served: Served, listening: socket.socket, key: str | None, timeout: float, drain: float
) -> None:
    """Answers requests until a signal ends it."""
    import uvicorn

    from nabla_fast.server.app import create_app

    class Server(uvicorn.Server):
        def handle_exit(self, sig: int, frame: Any) -> None:
            engine.drain(drain)
            super().handle_exit(sig, frame)

    app = create_app(engine, served, timeout=timeout, api_key=key)
    # The drain ends first, with an answer to everybody.
    grace = int(drain) + 10
    server = Server(uvicorn.Config(app, log_level="info", server_header=False, timeout_graceful_shutdown=grace))

    def stop(number: int, _: Any) -> None:
        if not server.should_exit:
            server.handle_exit(number, None)

    with kept_handlers() as before:
        # uvicorn has its own, and at its end sends what it has caught to these, which then have nothing to do.
        for number, handler in before.items():
            if handler is not signal.SIG_IGN:
                signal.signal(number, stop)
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        console.ERR.print(console.plain(f"serving {served.name} at http://{shown}:{port}/v1"), soft_wrap=True)
        if key is None and not host.startswith("127.") and host != "::1":
            console.print_warning(
                f"whoever reaches {shown} may use this server; give --api-key, or the environment variable "
                f"{API_KEY_VARIABLE}"
            )
        server.run(sockets=[listening])
