"""
The first-party project's API: one address that answers one question.

    python -m examples.api                              # the small model, at http://127.0.0.1:8000
    curl http://127.0.0.1:8000 -H "Content-Type: application/json" -d '{"prompt": "你好", "history": []}'

Gives {"response", "history", "status": 200, "time"}. Questions are answered one after the other; one whose client has gone is
no longer worked on. For OpenAI's API see examples/serve.py.
"""

import argparse
import asyncio
import datetime
from contextlib import aclosing
from typing import Annotated

from fastapi import FastAPI, HTTPException, Request
from pydantic import BaseModel, Field, ValidationError

from examples.http_guard import add_server_options, answer_errors, check_unicode, listen, run, what_is_invalid
from examples.load_model import add_model_options, iterate_in_threads, load_model


class Question(BaseModel):
    prompt: Annotated[str, check_unicode] = Field(min_length=1)
    history: list[tuple[Annotated[str, check_unicode], Annotated[str, check_unicode]]] | None = None
    max_length: int | None = Field(2048, ge=1, le=1 << 20)
    top_p: float | None = Field(0.7, gt=0, le=1, allow_inf_nan=False)
    temperature: float | None = Field(0.95, ge=0, le=100, allow_inf_nan=False)


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
        try:
            question = Question.model_validate_json(await request.body())
        except ValidationError as error:
            raise HTTPException(400, what_is_invalid(error.errors())) from None
        # What is null is as if it were not there.
        options = Question(prompt="-").model_dump(include={"max_length", "top_p", "temperature"})
        options |= question.model_dump(include=set(options), exclude_none=True)
        async with one_at_a_time:
            stream = model.stream_chat(tokenizer, question.prompt, question.history, **options)
            try:
                async with aclosing(iterate_in_threads(stream)) as answers:
                    async for response, history in answers:
                        pass
            except ValueError as error:  # a question that is too long, say
                raise HTTPException(400, str(error)) from None
        return Answer(response=response, history=history, time=f"{datetime.datetime.now():%Y-%m-%d %H:%M:%S}")

    return app


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add_model_options(parser)
    add_server_options(parser, port=8000)
    args = parser.parse_args()
    listener = listen(args.host, args.port)
    model, tokenizer = load_model(args)
    run(build_app(model, tokenizer), listener, "ChatGLM2", args)


if __name__ == "__main__":
    main()
