"""Errors as application/problem+json (RFC 9457): what was expected, what came, and a type that stays the same."""

from collections.abc import Mapping
from typing import Annotated, Any

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from pydantic import BaseModel, Field
from starlette.exceptions import HTTPException
from starlette.routing import Match

from migrate.errors import PostcopyError

MEDIA_TYPE = "application/problem+json"
TYPE_PREFIX = "urn:postcopy:"
GOT_CHARACTERS_MAX = 200
STATUS_OF: dict[str, int] = {
    "not-found": 404,
    "guest-busy": 409,
    "not-cancellable": 409,
    "not-recoverable": 409,
    "not-resolvable": 409,
    "not-abandonable": 409,
    "not-limitable": 409,
    "listen-refused": 403,
    "daemon-ending": 503,
}
"""By the code of the error. Another one is no answer that an operation is meant to give: 500."""
CODE_OF = {400: "request-malformed", 404: "not-found", 405: "method-not-allowed", 413: "request-too-large"}


class Problem(BaseModel):
    """Why a request was not served."""

    type: Annotated[str, Field(pattern="^urn:postcopy:[a-z-]+$", description="Stable: programs go by this.")]
    title: Annotated[str, Field(description="The type in words.")]
    status: Annotated[int, Field(description="The HTTP status once more.", ge=400, le=599)]
    detail: Annotated[str, Field(description="This occurrence, for people.")]
    expected: Annotated[str, Field(description="What would have been served; empty where `detail` says it all.")]
    got: Annotated[str, Field(description="What came instead.")]


def problem(
    status: int, code: str, detail: str, *, expected: str = "", got: str = "", headers: Mapping[str, str] | None = None
) -> Response:
    facts = {"detail": detail, "expected": expected, "got": got}
    # Halves of surrogate pairs have no UTF-8; text from outside may hold them.
    safe = {name: text.encode("utf-8", "replace").decode() for name, text in facts.items()}
    body = Problem(type=TYPE_PREFIX + code, title=code.replace("-", " "), status=status, **safe)
    return Response(body.model_dump_json(), status, headers, MEDIA_TYPE)


def refusals(expected: Mapping[int, tuple[str, str]]) -> dict[int | str, dict[str, Any]]:
    """``responses`` of an operation: status to (code, when), and what every operation may answer."""
    every = {
        500: ("internal", "A defect of the daemon; its log has the rest."),
        503: ("too-busy", "More connections, or more streams, than the daemon serves at once."),
    }
    return {status: _declared(status, code, when) for status, (code, when) in sorted({**every, **expected}.items())}


def _declared(status: int, code: str, when: str) -> dict[str, Any]:
    example = {
        "type": TYPE_PREFIX + code,
        "title": code.replace("-", " "),
        "status": status,
        "detail": when,
        "expected": "",
        "got": "",
    }
    content = {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}, "example": example}}
    return {"description": f"`{TYPE_PREFIX}{code}`: {when}", "content": content}


def add_handlers(app: FastAPI) -> None:
    @app.exception_handler(PostcopyError)
    async def refused(_: Request, error: PostcopyError) -> Response:
        return problem(STATUS_OF.get(error.code, 500), error.code, str(error), expected=error.expected, got=error.got)

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        first = error.errors()[0]
        if first["type"] == "json_invalid":
            reason = str(first.get("ctx", {}).get("error", first["msg"]))
            return problem(400, CODE_OF[400], f"body: {reason}", expected="a JSON document", got=reason)
        location = first["loc"] if first["loc"][0] == "body" else first["loc"][:2]  # the rest is the framework's own
        where = ".".join(str(part) for part in location)
        got = "nothing" if first["type"] == "missing" else repr(first.get("input"))[:GOT_CHARACTERS_MAX]
        return problem(422, "request-invalid", f"{where}: {first['msg']}, got {got}", expected=first["msg"], got=got)

    @app.exception_handler(HTTPException)
    async def refused_by_the_framework(request: Request, error: HTTPException) -> Response:
        code = CODE_OF.get(error.status_code, "request-refused")
        what = f"{request.method} {request.url.path[:GOT_CHARACTERS_MAX]}"
        headers = {name.lower(): value for name, value in (error.headers or {}).items()}
        if error.status_code == 405:
            headers["allow"] = ", ".join(sorted(_methods(request)))
        return problem(error.status_code, code, f"{what}: {error.detail}", got=what, headers=headers)


def _methods(request: Request) -> set[str]:
    """All that the path takes: the framework names those of the first route alone."""
    matching = (route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE)
    return {method for route in matching for method in getattr(route, "methods", None) or ()}
