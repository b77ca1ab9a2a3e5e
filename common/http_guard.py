"""
Protects a server: checks keys and host names, limits the size and duration of requests, and cancels the requests of clients that
disconnect.

`Guard` is an ASGI middleware, `Connection` uvicorn's HTTP/1.1 with time limits, and `run` starts both.
"""

import argparse
import asyncio
import contextlib
import ipaddress
import secrets
import socket
import sys
from collections.abc import Callable
from contextvars import ContextVar

import uvicorn
from starlette.middleware.cors import CORSMiddleware
from starlette.responses import JSONResponse
from uvicorn.protocols.http.h11_impl import H11Protocol

from common.http_errors import error_response


SECONDS = 30  # for the headers of a request, for its body, and between requests
SECONDS_TO_READ = 60  # for a client to read its answer
MAX_IDLE = 400  # connections without a complete request; beyond this, the oldest is closed
MAX_REQUESTS = 500  # at once: more are answered with 503. Both together stay below the usual limit of 1,024 open files
OPEN_PATHS = ("/health", "/docs", "/openapi.json")  # no API key needed


def listen(host: str, port: int) -> socket.socket:
    """Opens the port before the model is loaded. Ends with one line if that fails."""
    try:
        return socket.create_server(
            (host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET, backlog=512
        )
    except OSError as error:
        raise SystemExit(
            f"--host {host} --port {port}: {error.strerror.split(' (')[0]}. Choose another --port, or 0 for any."
        ) from None


def configuration(app) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=Connection,
        ws="none",
        log_level="warning",
        proxy_headers=False,
        timeout_keep_alive=SECONDS,
        timeout_graceful_shutdown=3,
    )


class Server(uvicorn.Server):
    """Calls `on_exit` when it is told to stop, before it waits for the requests in progress."""

    def __init__(self, config: uvicorn.Config, on_exit: Callable):
        super().__init__(config)
        self.on_exit = on_exit

    def handle_exit(self, sig, frame):
        self.on_exit()
        for connection in list(Connection.idle):
            asyncio.get_running_loop().call_soon_threadsafe(connection.transport.abort)
        super().handle_exit(sig, frame)


def run(
    app,
    listener: socket.socket,
    name: str,
    args: argparse.Namespace,
    on_exit: Callable = lambda: None,
    around: Callable = lambda app: app,
):
    """
    Serves until interrupted. The printed address names the port, for --port 0 too.

    Args:
        around: Returns what to serve in place of the guarded application, to see what the guard refuses, too.
        on_exit: Called on SIGINT and SIGTERM. Requests then have 3 seconds to end.
    """
    if args.host not in ("127.0.0.1", "localhost", "::1") and not args.api_key:
        print(f"Anyone who can reach {args.host} can use this server. Consider --api-key.", file=sys.stderr)
    host = f"[{args.host}]" if ":" in args.host else args.host
    print(f"{name} at http://{host}:{listener.getsockname()[1]}", flush=True)
    config = configuration(around(guarded(app, args.api_key, args.max_body, args.allowed_hosts, args.cors)))
    with contextlib.suppress(KeyboardInterrupt):  # uvicorn raises the signal again after it has stopped
        Server(config, on_exit).run(sockets=[listener])


class Connection(H11Protocol):
    """
    uvicorn's HTTP/1.1. A connection without a complete request is closed after `SECONDS`, or earlier if there are more than
    `MAX_IDLE` of them and it is the oldest.
    """

    current: ContextVar["Connection | None"] = ContextVar("connection", default=None)  # of the current request
    idle: dict["Connection", asyncio.TimerHandle] = {}  # the oldest first
    is_lost = False

    def connection_made(self, transport: asyncio.Transport):
        super().connection_made(transport)
        self.wait()

    def data_received(self, data: bytes):
        self.current.set(self)  # the application runs in a task that starts here, and inherits it
        super().data_received(data)

    def connection_lost(self, error: Exception | None):
        self.is_busy()
        self.is_lost = True
        super().connection_lost(error)

    def wait(self, seconds: float | None = None):
        """Starts to wait for a request, or the rest of one."""
        self.is_busy()
        if self.is_lost:
            return
        self.idle[self] = asyncio.get_running_loop().call_later(seconds or SECONDS, self.transport.abort)
        if len(self.idle) > MAX_IDLE:
            next(iter(self.idle)).transport.abort()

    def is_busy(self):
        """A complete request has arrived."""
        if timer := self.idle.pop(self, None):
            timer.cancel()


def guarded(app, api_key: str | None, max_body: int, allowed_hosts=(), cors=()):
    """Wraps the application in a `Guard` and, around that, in the CORS middleware."""
    app = Guard(app, api_key, max_body, allowed_hosts)
    if cors:
        app = CORSMiddleware(app, allow_origins=list(cors), allow_methods=["*"], allow_headers=["*"])
    return app


class Guard:
    """
    Args:
        app: The ASGI application.
        api_key: Clients must send it as `Authorization: Bearer ...`, except to `OPEN_PATHS`. None: no key is needed.
        max_body: Bytes of a request's body.
        allowed_hosts: Names that are allowed in the Host header, besides localhost and IP addresses. This protects
            against DNS rebinding, where the name of another site resolves to this machine. "*": all names.
    """

    def __init__(self, app, api_key: str | None = None, max_body: int = 1 << 20, allowed_hosts=()):
        self.app, self.api_key, self.max_body, self.allowed_hosts = app, api_key, max_body, set(allowed_hosts)
        self.requests = 0

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)
        connection = Connection.current.get()
        # A trailing slash makes no difference, and HEAD is GET, of whose answer uvicorn leaves out the body.
        method = "GET" if scope["method"] == "HEAD" else scope["method"]
        scope = {**scope, "method": method, "path": scope["path"].rstrip("/") or "/"}
        try:
            if (refusal := self.refuse(scope)) is not None:
                return await refusal(scope, receive, send)
            if connection is not None:
                connection.wait(2 * SECONDS)  # longer than below, so that there is time to answer
            try:
                async with asyncio.timeout(SECONDS):
                    body = await self.read_body(receive)
            except TimeoutError:
                message = f"The request's body did not arrive within {SECONDS} seconds."
                return await error_response(408, message, {"Connection": "close"})(scope, receive, send)
            if body is None:
                message = f"The request's body is larger than {self.max_body} bytes (--max-body)."
                return await error_response(413, message, {"Connection": "close"})(scope, receive, send)
            if connection is not None:
                connection.is_busy()
            if self.requests >= MAX_REQUESTS:
                message = f"The server is busy with {MAX_REQUESTS} requests: try again later."
                return await error_response(503, message, {"Retry-After": "5"})(scope, receive, send)
            self.requests += 1
            try:
                await self.run_while_connected(body, scope, receive, send)
            finally:
                self.requests -= 1
        except (asyncio.CancelledError, ConnectionResetError):
            pass  # the server is stopping, or the client has disconnected
        finally:
            if connection is not None:
                connection.wait()

    def refuse(self, scope) -> JSONResponse | None:
        headers = dict(scope["headers"])
        host = headers.get(b"host", b"localhost").decode("latin-1")
        if not self.is_allowed_host(host):
            message = f"The name {host[:100]!r} is not one of this server's: start it with --allowed-hosts NAME."
            return error_response(403, message)
        if self.api_key and scope["path"] not in OPEN_PATHS:
            scheme, _, key = headers.get(b"authorization", b"").partition(b" ")
            if scheme.lower() != b"bearer" or not secrets.compare_digest(key.strip(), self.api_key.encode()):
                message = "The API key is missing or wrong. Send it as a header: Authorization: Bearer KEY."
                return error_response(401, message, {"WWW-Authenticate": "Bearer"}, code="invalid_api_key")
        return None

    def is_allowed_host(self, host: str) -> bool:
        name, _, port = host.rpartition(":")
        name = (name if name and port.isdigit() else host).lower().rstrip(".")
        if "*" in self.allowed_hosts or name == "localhost" or name in self.allowed_hosts:
            return True
        with contextlib.suppress(ValueError):
            return bool(ipaddress.ip_address(name.strip("[]")))
        return False

    async def read_body(self, receive) -> bytes | None:
        """Returns the body, or None if it is too large. Reads it to the end, as most clients read the answer only then."""
        parts, length, more = [], 0, True
        while more and length <= 16 * self.max_body:
            message = await receive()
            if message["type"] == "http.disconnect":
                raise ConnectionResetError
            length += len(message.get("body", b""))
            if length <= self.max_body:
                parts.append(message.get("body", b""))
            more = message.get("more_body", False)
        return b"".join(parts) if length <= self.max_body else None

    async def run_while_connected(self, body: bytes, scope, receive, send):
        """Calls the application with the body, and cancels it if the client disconnects or stops reading."""
        gone = asyncio.Event()
        messages = iter([{"type": "http.request", "body": body, "more_body": False}])

        async def receive_again():
            if (message := next(messages, None)) is None:
                await gone.wait()
                message = {"type": "http.disconnect"}
            return message

        async def send_in_time(message):
            try:
                async with asyncio.timeout(SECONDS_TO_READ):
                    await send(message)
            except TimeoutError:
                Connection.current.get().transport.abort()
                gone.set()
                raise

        async def wait_for_end():
            while (await receive())["type"] != "http.disconnect":
                pass
            gone.set()

        answer = asyncio.ensure_future(self.app(scope, receive_again, send_in_time))
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
