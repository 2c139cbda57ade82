"""Serve models in OpenAI's protocol: python -m experiments.serve --model M [--port 8000] [--api_key_file F] [--ui]

M is a workdir, a Hugging Face folder, a GGUF file or a hub name; it goes by its last part, or as NAME=M by NAME,
and --model may be repeated. Language models write text, others make embeddings. /ready answers 200 once all is compiled.
SIGTERM ends the server when what runs is done, or after --drain_seconds; the exit code is then 0.
"""

import pathlib
import resource
import signal
import socket
from collections.abc import Sequence

from experiments import cli


def main(argv: Sequence[str]) -> int:
    """Serves until it is told to stop; returns the exit code."""
    parser = cli.Parser(__doc__)
    parser.add_argument(
        "--model", required=True, action="append", metavar="[NAME=]M", help="what to serve; may be repeated"
    )
    parser.add_argument("--host", default="127.0.0.1", help="the address to listen at; 0.0.0.0 for every one")
    parser.add_argument("--port", type=int, default=8000, help="0 for any that is free")
    parser.add_argument("--api_key_file", metavar="F", help="keys, one a line, of which a request must bring one")
    parser.add_argument("--ui", action="store_true", help="serve a page to chat in, at /ui")
    parser.add_argument("--num_slots", type=int, default=8, help="texts that are written at once, by each model")
    parser.add_argument(
        "--cache_len", type=int, help="tokens of a prompt and its text; the model's context, if not given"
    )
    parser.add_argument("--weights", help="float32, bfloat16, int8 or int4; if not given, the model's, on CPU float32")
    parser.add_argument("--max_waiting", type=int, default=256, help="texts that may wait for a slot; beyond, it's 429")
    parser.add_argument("--max_texts", type=int, default=128, help="that one request may ask for, prompts times n")
    parser.add_argument("--max_body_bytes", type=int, default=4 << 20, help="of one request")
    parser.add_argument("--request_seconds", type=float, default=600.0, help="in which a request must be answered")
    parser.add_argument("--drain_seconds", type=int, default=30, help="for what still runs when the server is to stop")
    arguments = parser.parse(argv)
    for name in ("num_slots", "max_texts", "max_body_bytes", "request_seconds", "drain_seconds"):
        if getattr(arguments, name) <= 0:
            parser.error(f"--{name} {getattr(arguments, name)} must be above 0")
    if arguments.max_waiting < 0 or not 0 <= arguments.port < 1 << 16:
        parser.error(
            f"--max_waiting {arguments.max_waiting} must be at least 0, and --port {arguments.port} from 0 to 65535"
        )
    named = [
        model.partition("=")[::2] if "=" in model else (pathlib.Path(model).name, model) for model in arguments.model
    ]
    if len(dict(named)) < len(named) or not all(name for name, _ in named):
        parser.error(f"--model: the names {', '.join(repr(name) for name, _ in named)} must differ, and none be empty")
    try:
        import uvicorn

        from gptjax.serving.models import ServedModel
        from gptjax.serving.openai_api import make_app
        from gptjax.serving.protocol import Limits

        if arguments.ui:
            from gptjax.serving import page
    except ImportError as error:
        extra = "ui" if arguments.ui else "serve"
        raise cli.UserError(f"{error.name} is missing: pip install 'gptjax[{extra}]'") from error

    import gptjax
    from gptjax.generation.engine import Engine
    from gptjax.pipelines import source_facts
    from gptjax.workdir import environment

    keys: list[str] = []
    with cli.user_errors():
        if arguments.api_key_file:
            keys = pathlib.Path(arguments.api_key_file).read_text().split()
            if not keys:
                raise cli.UserError(f"--api_key_file {arguments.api_key_file} holds no key")
        family = socket.AF_INET6 if ":" in arguments.host else socket.AF_INET
        try:
            listener = socket.create_server((arguments.host, arguments.port), family=family, backlog=2048)
        except OSError as error:
            raise cli.UserError(f"--host {arguments.host} --port {arguments.port}: {error.strerror}") from error
        models = []
        for name, path in named:
            loaded = gptjax.load(path)
            eos_ids = source_facts(path)["generation_config"].get("eos_token_id") or []
            engine = None
            if loaded.model.config.head == "language_model":
                engine = Engine(
                    loaded.model,
                    loaded.params,
                    num_slots=arguments.num_slots,
                    cache_len=arguments.cache_len,
                    weights=arguments.weights,
                )
            eos_ids = eos_ids if isinstance(eos_ids, list) else [eos_ids]
            models.append(ServedModel(name, loaded, engine, eos_ids, arguments.max_waiting))
    limits = Limits(arguments.max_body_bytes, arguments.max_texts, seconds=arguments.request_seconds)
    app = make_app(models, api_keys=keys, limits=limits)
    if arguments.ui:
        page.mount(app, models, keys, arguments.request_seconds)
    config = uvicorn.Config(
        app,
        log_level="warning",
        access_log=False,
        server_header=False,
        timeout_graceful_shutdown=arguments.drain_seconds,
    )
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))  # a connection is a file
    # uvicorn raises the signal again once it is done, which would be the process's end.
    signal.signal(signal.SIGTERM, lambda *_: None)
    host, port = listener.getsockname()[:2]
    print(f"serving {', '.join(model.name for model in models)} at http://{host}:{port}/v1", flush=True)
    uvicorn.Server(config).run(sockets=[listener])
    cli.write_report(arguments.json, environment(), [], {})
    return 0


if __name__ == "__main__":
    cli.run(main)
