"""The metrics at /metrics, in Prometheus' format."""

import time
import uuid
from collections.abc import Sequence

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
from starlette.routing import BaseRoute, Match

from .generation import Engine


SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120)


class Metrics:
    def __init__(self, engine: Engine):
        self.registry = registry = CollectorRegistry()
        self.requests = Counter("chatglm_requests", "Requests", ["path", "status"], registry=registry)
        self.prompt_tokens = Counter("chatglm_prompt_tokens", "Tokens of prompts", registry=registry)
        self.cached_tokens = Counter("chatglm_cached_tokens", "Of these, taken from caches", registry=registry)
        self.answer_tokens = Counter("chatglm_answer_tokens", "Tokens of answers", registry=registry)
        self.first = Histogram(
            "chatglm_time_to_first_token_seconds", "From the request on", buckets=SECONDS, registry=registry
        )
        self.next = Histogram(
            "chatglm_time_per_token_seconds", "Between tokens of an answer", buckets=SECONDS, registry=registry
        )
        for name in ("waiting", "running"):
            gauge = Gauge(f"chatglm_answers_{name}", f"Answers that are {name}", registry=registry)
            gauge.set_function(lambda name=name: getattr(engine, name))


class CountRequests:
    """
    ASGI middleware around all others: counts answers by path and status, and gives each an `x-request-id`, as OpenAI does.

    Args:
        routes: Those of the application. Other paths, which clients make up, are not told apart.
    """

    def __init__(self, app, metrics: Metrics, routes: Sequence[BaseRoute]):
        self.app, self.metrics, self.routes = app, metrics, routes

    async def __call__(self, scope, receive, send):
        if scope["type"] != "http":
            return await self.app(scope, receive, send)

        async def count_and_send(message):
            if message["type"] == "http.response.start":
                self.metrics.requests.labels(self.path_of(scope), message["status"]).inc()
                id = f"req_{uuid.uuid4().hex}".encode()
                message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", id)]}
            await send(message)

        await self.app(scope, receive, count_and_send)

    def path_of(self, scope) -> str:
        scope = {**scope, "path": scope["path"].rstrip("/")}
        return next((route.path for route in self.routes if route.matches(scope)[0] != Match.NONE), "")


class Clock:
    """
    Observes when the tokens of one answer come.

    Args:
        arrival: When its request came.
    """

    def __init__(self, metrics: Metrics, arrival: float):
        self.metrics, self.last, self.is_first = metrics, arrival, True

    def tick(self):
        now = time.perf_counter()
        (self.metrics.first if self.is_first else self.metrics.next).observe(now - self.last)
        self.metrics.answer_tokens.inc()
        self.last, self.is_first = now, False
