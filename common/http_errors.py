"""
Errors in the format of OpenAI's API: {"error": {"message": ..., "type": ..., "param": ..., "code": ...}}.
"""

from fastapi import FastAPI, HTTPException
from pydantic import BaseModel, ValidationError
from pydantic_core import from_json
from starlette.exceptions import HTTPException as StarletteHTTPException
from starlette.responses import JSONResponse


INTERNAL = "Internal error. The server's log says more."

# pydantic's names of types, in words
TYPES = {"int": "an integer", "float": "a number", "string": "a string", "bool": "a boolean", "list": "a list"}
TYPES |= {"dict": "an object", "model": "an object", "tuple": "a list"}
LIMITS = {"ge": "at least {}", "gt": "greater than {}", "le": "at most {}", "lt": "less than {}"}
LIMITS |= {"min_length": "at least {} long", "max_length": "at most {} long"}


class ApiError(Exception):
    """An error for the client: the status, the message, and OpenAI's `param` and `code`."""

    def __init__(self, status: int, message: str, param: str | None = None, code: str | None = None):
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict:
        kind = "server_error" if self.status >= 500 else "invalid_request_error"
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


def error_response(status: int, message: str, headers: dict | None = None, code: str | None = None) -> JSONResponse:
    return JSONResponse(ApiError(status, message, code=code).body(), status_code=status, headers=headers)


def answer_errors(app: FastAPI):
    """Makes the application answer all errors in JSON, without internal details."""

    @app.exception_handler(ApiError)
    async def api_error(request, error: ApiError):
        return JSONResponse(error.body(), status_code=error.status)

    @app.exception_handler(StarletteHTTPException)
    async def http_error(request, error: HTTPException):
        message = f"{request.method} {request.url.path}: {error.detail}. /docs lists what there is."
        return error_response(error.status_code, message, error.headers)

    @app.exception_handler(Exception)  # Starlette raises it again for the server's log
    async def unexpected(request, error: Exception):
        return error_response(500, INTERNAL)


def parse(model: type[BaseModel], body: bytes) -> BaseModel:
    """
    Reads a request.

    Raises:
        ApiError: 400 that says what is wrong with which field.
    """
    try:
        data = from_json(body, allow_inf_nan=False)
    except ValueError as error:
        raise ApiError(400, f"The request's body is not JSON: {error}.") from None
    if not isinstance(data, dict):
        raise ApiError(400, f"The request's body must be a JSON object, not {type_of(data)}.")
    try:
        return model.model_validate(data)
    except ValidationError as error:
        raise explain(error.errors(include_url=False)[0]) from None


def explain(error: dict) -> ApiError:
    """Returns the ApiError for an error of pydantic."""
    where, kind, context = "", error["type"], error.get("ctx", {})
    for part in (*error["loc"], *([context["name"]] if kind == "unsupported" else [])):
        where += f"[{part}]" if isinstance(part, int) else f".{part}" if where else str(part)
    name = f"'{where}'" if where else "the request"
    given = str(error["input"])[:60]
    if kind == "unsupported":
        message = f"Unsupported parameter: {name}. This server cannot do what it asks for: leave it out."
        return ApiError(400, message, where, "unsupported_parameter")
    if kind == "missing":
        return ApiError(400, f"Missing required parameter: {name}.", where, "missing_required_parameter")
    if kind == "value_error":
        return ApiError(400, f"Invalid value for {name}: {context['error']}.", where, "invalid_value")
    if kind == "literal_error":
        message = f"Invalid value for {name}: expected {context['expected']}, got {given!r}."
        return ApiError(400, message, where, "invalid_value")
    for limit, words in LIMITS.items():
        if limit in context:
            value = f"{context[limit]:g}" if isinstance(context[limit], float) else context[limit]
            message = f"must be {words.format(value)}, got {len(error['input']) if 'length' in limit else given}"
            return ApiError(400, f"Invalid value for {name}: {message}.", where, "invalid_value")
    expected = TYPES.get(kind.removesuffix("_type"))
    if expected:
        message = f"Invalid type for {name}: expected {expected}, got {type_of(error['input'])} instead."
        return ApiError(400, message, where, "invalid_type")
    return ApiError(400, f"Invalid value for {name}: {error['msg']}.", where, "invalid_value")


def type_of(value) -> str:
    """Returns JSON's name for the type of a value."""
    names = {
        bool: "a boolean",
        int: "an integer",
        float: "a number",
        str: "a string",
        list: "a list",
        dict: "an object",
    }
    return names.get(type(value), "null")
