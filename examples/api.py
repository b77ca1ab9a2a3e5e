"""
Answers questions over HTTP with the interface of the first-party project's api.py.

    python -m examples.api                              # the small model, at http://127.0.0.1:8000
    curl http://127.0.0.1:8000 -H "Content-Type: application/json" -d '{"prompt": "你好", "history": []}'

The answer is {"response", "history", "status": 200, "time"}. Questions are answered one after another. If a client disconnects,
its request is cancelled. For OpenAI's API use `python -m serving`.
"""

from common.options import Parser, add_model_options, add_server_options


def options() -> Parser:
    parser = Parser(__doc__)
    add_model_options(parser)
    add_server_options(parser, port=8000)
    return parser


if __name__ == "__main__":
    options().parse_args()  # answers --help and wrong options before the slow imports below


import asyncio
import datetime
from contextlib import aclosing

from fastapi import FastAPI, Request
from pydantic import BaseModel, Field

from common.http_errors import ApiError, answer_errors, parse
from common.http_guard import listen, run
from common.load_model import iterate_in_threads, load_model


# Values for what is null, missing or 0, as published
DEFAULTS = {"max_length": 2048, "top_p": 0.7, "temperature": 0.95}


class Question(BaseModel):
    prompt: str
    history: list[tuple[str, str]] | None = None
    max_length: int | None = Field(None, ge=0)
    top_p: float | None = Field(None, ge=0, le=1)
    temperature: float | None = Field(None, ge=0, le=100)
    stream: bool | None = None


class Answer(BaseModel):
    response: str
    history: list[tuple[str, str]]
    status: int = 200
    time: str


def build_app(model, tokenizer) -> FastAPI:
    app = FastAPI()
    answer_errors(app)
    one_at_a_time = asyncio.Semaphore(1)

    # As published, whatever the Content-Type says.
    body = {"required": True, "content": {"application/json": {"schema": Question.model_json_schema()}}}

    @app.post("/", openapi_extra={"requestBody": body})
    async def create_item(request: Request) -> Answer:
        question = parse(Question, await request.body())
        if question.stream:
            raise ApiError(400, "stream: this API cannot stream. Use python -m serving for that.", "stream")
        options = {name: getattr(question, name) or default for name, default in DEFAULTS.items()}
        async with one_at_a_time:
            stream = model.stream_chat(tokenizer, question.prompt, question.history, **options)
            try:
                async with aclosing(iterate_in_threads(stream)) as answers:
                    async for response, history in answers:
                        pass
            except ValueError as error:  # for example a question that is too long
                raise ApiError(400, str(error)) from None
        return Answer(response=response, history=history, time=f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}")

    return app


def main():
    args = options().parse_args()
    listener = listen(args.host, args.port)
    model, tokenizer = load_model(args)
    run(build_app(model, tokenizer), listener, "ChatGLM2", args)


if __name__ == "__main__":
    main()
