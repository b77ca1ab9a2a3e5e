"""
What stands between a server's application and its clients, as one ASGI middleware: an API key, a limit for the size of
requests, and an end to the work for clients that have gone.

Errors are JSON as OpenAI's API has them: {"error": {"message": ..., "type": ..., "param": null, "code": null}}.
"""

import argparse
import asyncio
import os
import secrets
import socket
import sys

import uvicorn
from fastapi import FastAPI, HTTPException
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import AfterValidator
from starlette.exceptions import HTTPException as StarletteHTTPException

from examples.load_model import at_least


MAX_CONNECTIONS = 512  # more are answered with 503


def add_server_options(parser: argparse.ArgumentParser, port: int):
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0: other machines too (default: this one only)")
    parser.add_argument(
        "--port",
        type=at_least(0, maximum=65535, number=int),
        default=port,
        help="0: any free one; default: %(default)s",
    )
    parser.add_argument(
        "--max-body", type=at_least(1, number=int), default=1 << 20, help="bytes of a request; default: 1 MiB"
    )
    parser.add_argument(
        "--api-key", default=os.environ.get("API_KEY"), help="that clients have to send (default: $API_KEY, or none)"
    )


def listen(host: str, port: int) -> socket.socket:
    """Takes the port, before a model is loaded for nothing; ends with one line if that cannot be."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise SystemExit(
            f"--host {host} --port {port}: {error.strerror.split(' (')[0]}. Choose another --port, or 0 for any."
        ) from None


def run(app, listener: socket.socket, name: str, args: argparse.Namespace):
    """Serves until interrupted; with --port 0 the address says which port it is."""
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
        print(f"Anyone who can reach {args.host} can use this server: consider --api-key.", file=sys.stderr)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{name} at http://{host}:{listener.getsockname()[1]}", flush=True)
    guarded = Guard(app, args.api_key, args.max_body)
    config = uvicorn.Config(
        guarded, log_level="warning", limit_concurrency=MAX_CONNECTIONS, timeout_graceful_shutdown=3
    )
    uvicorn.Server(config).run(sockets=[listener])


INTERNAL = "Internal error. The server's log says more."


def error_body(status: int, message: str) -> dict:
    kind = "server_error" if status >= 500 else "invalid_request_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": None}}


def error_response(status: int, message: str, headers: dict | None = None) -> JSONResponse:
    return JSONResponse(error_body(status, message), status_code=status, headers=headers)


def answer_errors(app: FastAPI):
    """Has all errors answered in JSON, without what the server alone should know."""

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request, error: HTTPException):
        return error_response(error.status_code, str(error.detail), error.headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request, error: RequestValidationError):
        if "json" not in request.headers.get("content-type", ""):
            return error_response(415, "The body must be JSON, and say so: Content-Type: application/json.")
        return error_response(400, what_is_invalid(error.errors()))

    @app.exception_handler(Exception)  # Starlette raises it again for the server's log
    async def unexpected(request, error: Exception):
        return error_response(500, INTERNAL)


def what_is_invalid(errors: list[dict]) -> str:
    """Returns pydantic's errors as a line."""
    lines = []
    for error in errors[:3]:
        where = ".".join(str(part) for part in error["loc"] if part != "body") or "The request's body"
        if error["type"] == "json_invalid":
            reason = error["ctx"]["error"]
            more = "" if reason in error["msg"] else f" ({reason})"
        else:
            more = "" if isinstance(error["input"], (dict, list)) else f", got {str(error['input'])[:60]!a}"
        lines.append(f"{where}: {error['msg']}{more}")
    return "; ".join(lines)


# JSON can have halves of surrogate pairs, which are no characters: str.encode raises a ValueError.
check_unicode = AfterValidator(lambda text: text.encode().decode())


class Guard:
    """
    Args:
        app: The ASGI application.
        api_key: What clients have to send as `Authorization: Bearer ...`, except to `/health`. None: nothing.
        max_body: Bytes of a request's body.
    """

    def __init__(self, app, api_key: str | None = None, max_body: int = 1 << 20):
        self.app, self.api_key, self.max_body = app, api_key, max_body

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        # Clients cannot choose the ids of their requests: two with the same would get each other's answers.
        scope["headers"] = [(name, value) for name, value in scope["headers"] if name != b"x-request-id"]
        headers = dict(scope["headers"])
        if scope["path"] != "/health" and not self.is_allowed(headers.get(b"authorization", b"")):
            response = error_response(401, "The API key is missing or wrong.", {"WWW-Authenticate": "Bearer"})
            return await response(scope, receive, send)
        body = await self.read_body(receive)
        if body is None:
            message = f"The request's body is larger than {self.max_body} bytes."
            return await error_response(413, message, {"Connection": "close"})(scope, receive, send)
        await self.run_while_connected(body, scope, receive, send)

    def is_allowed(self, authorization: bytes) -> bool:
        if not self.api_key:
            return True
        return secrets.compare_digest(authorization, b"Bearer " + self.api_key.encode())

    async def read_body(self, receive) -> bytes | None:
        """Returns the body, or None if it is too large; most clients read the answer only after all is sent."""
        body, length, more = b"", 0, True
        while more and length <= 16 * self.max_body:
            message = await receive()
            length += len(message.get("body", b""))
            if length <= self.max_body:
                body += message.get("body", b"")
            more = message.get("more_body", False)
        return body if length <= self.max_body else None

    async def run_while_connected(self, body: bytes, scope, receive, send):
        """Calls the application with a body that is read already, and cancels it when the client hangs up."""
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again():
            if (message := next(messages, None)) is None:
                await gone.wait()
                message = {"type": "http.disconnect"}
            return message

        async def wait_for_end():
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self.app(scope, receive_again, send))
        end = asyncio.ensure_future(wait_for_end())
        try:
            await asyncio.wait([answer, end], return_when=asyncio.FIRST_COMPLETED)
            if not answer.done():
                # The answer may have been sent to its end, of which the application is about to know.
                await asyncio.wait([answer], timeout=0.1)
            if answer.done():
                return answer.result()
        finally:
            answer.cancel()
            end.cancel()
            await asyncio.gather(answer, end, return_exceptions=True)
