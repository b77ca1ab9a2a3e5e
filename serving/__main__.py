"""
OpenAI's API on a ChatGLM2 model.

    python -m serving                                         # the small model, at http://127.0.0.1:8000/v1
    python -m serving --model THUDM/chatglm2-6b --quantization int4
    python -m serving --model THUDM/chatglm2-6b --continuous-batching
    API_KEY=... python -m serving --host 0.0.0.0

One request at a time, in order; with --continuous-batching all at once, on a paged cache. See docs/serving.md.
"""

from pathlib import Path

from common.errors import needs_extra
from common.options import Parser, add_model_options, add_server_options, at_least


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_options(parser)
    add_server_options(parser, port=8000)
    parser.add_argument("--name", help="what clients call the model (default: the last part of --model)")
    parser.add_argument("--any-model-name", action="store_true", help="answer whatever name clients call the model by")
    parser.add_argument("--continuous-batching", action="store_true", help="answer all requests at once")
    parser.add_argument(
        "--cache-tokens",
        type=at_least(0, number=int),
        help="one by one: tokens of earlier dialogues to keep (default: 32768; 0: none). With continuous batching: room for "
        "all requests (default: 32768 on the CPU, elsewhere what memory allows)",
    )
    parser.add_argument(
        "--max-tokens", type=at_least(1, number=int), default=2048, help="of an answer at most; default: %(default)s"
    )
    parser.add_argument("--top-p", type=at_least(0, above=True, maximum=1), default=0.8, help="default: %(default)s")
    parser.add_argument("--temperature", type=at_least(0), default=0.8, help="of requests that say none; default: 0.8")
    return parser


def main(argv=None):
    parser = options()
    args = parser.parse_args(argv)
    if args.continuous_batching and args.cache_tokens is not None and args.cache_tokens < 256:
        parser.error(f"--cache-tokens {args.cache_tokens}: continuous batching needs at least 256")

    with needs_extra("serve"):  # late, as they take seconds, and --help does not need them
        from common.http_guard import listen, run
        from common.load_model import load_model

        from .batching import Batched
        from .generation import OneByOne
        from .metrics import CountRequests
        from .server import Defaults, Service, build_app

    listener = listen(args.host, args.port)
    model, tokenizer = load_model(args)
    if args.cache_tokens is None and not (args.continuous_batching and model.device.type != "cpu"):
        args.cache_tokens = 32768
    if args.continuous_batching:
        engine = Batched(model, args.cache_tokens)
    else:
        engine = OneByOne(model, args.cache_tokens)
    defaults = Defaults(args.max_tokens, args.temperature, args.top_p)
    name = args.name or Path(args.model).resolve().name
    service = Service(name, model, tokenizer, engine, defaults, args.any_model_name)
    app = build_app(service)
    count = lambda guarded: CountRequests(guarded, service.metrics, app.routes)  # noqa: E731
    run(app, listener, f"{name}, by OpenAI's API (/v1)", args, service.stop, count)


if __name__ == "__main__":
    main()
