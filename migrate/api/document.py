"""The OpenAPI document: made from the code, kept in openapi.json, served from there.

What the framework adds of its own, and changes between its versions (titles made from names, its own errors), is taken out.
"""

import json
from importlib import resources
from typing import Any

from fastapi import FastAPI, Response
from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from migrate.api import models
from migrate.api.problems import Problem

FILE = resources.files("migrate.api") / "openapi.json"
DESCRIPTION = """Of one postcopy daemon, on the unix socket `api.sock` in its runtime directory (0600: who opens it may do all).

Every error is `application/problem+json`; `type` is stable. Names carry their units. Times are RFC 3339, UTC.
A daemon keeps the migrations under way and the last ended ones, in memory: what is to stay longer, read in time."""
OPENAPI_VERSION = "3.2.0"
"""The first that can say what the events of a stream are (``itemSchema``); all else is 3.1's."""
EVENTS: dict[str, type[BaseModel]] = {
    "state": models.StateEvent,
    "settled": models.SettledEvent,
    "progress": models.ProgressEvent,
    "guest": models.GuestEvent,
    "snapshot": models.SnapshotEvent,
    "missed": models.MissedEvent,
    "end": models.EndEvent,
}


async def served() -> Response:
    return Response(FILE.read_bytes(), media_type="application/json")


def text_of(app: FastAPI) -> str:
    return json.dumps(document_of(app), indent=1, sort_keys=True, ensure_ascii=False) + "\n"


def document_of(app: FastAPI) -> dict[str, Any]:
    document = app.openapi()
    extra = [(model, "serialization") for model in (Problem, *EVENTS.values())]
    _, definitions = models_json_schema(extra, ref_template="#/components/schemas/{model}")  # type: ignore[arg-type]
    schemas = document["components"]["schemas"]
    for name in ("HTTPValidationError", "ValidationError"):
        schemas.pop(name, None)
    for name, schema in definitions["$defs"].items():
        schemas.setdefault(name, schema)
    schemas["Event"] = {"oneOf": [_event(name, model) for name, model in EVENTS.items()]}
    for path in document["paths"].values():
        for operation in path.values():
            stream = operation["responses"].get("200", {}).get("content", {}).get("text/event-stream", {})
            stream.pop("schema", None)  # the framework says of any stream that it is a string
    document["openapi"] = OPENAPI_VERSION
    document["servers"] = [{"url": "http://daemon", "description": "api.sock; the host name means nothing."}]
    cleaned: dict[str, Any] = _without_titles(document)
    return cleaned


def _event(name: str, model: type[BaseModel]) -> dict[str, Any]:
    """One event of a stream: its fields, of which ``data`` is JSON."""
    data = {
        "type": "string",
        "contentMediaType": "application/json",
        "contentSchema": {"$ref": f"#/components/schemas/{model.__name__}"},
    }
    fields = {"event": {"const": name}, "id": {"type": "string"}, "data": data}
    return {"type": "object", "required": ["event", "data"], "properties": fields}


def _without_titles(node: Any) -> Any:
    """Of schemas: they only say a name again. A property that is called title stays."""
    if isinstance(node, list):
        return [_without_titles(item) for item in node]
    if not isinstance(node, dict):
        return node
    is_schema = isinstance(node.get("title"), str) and "version" not in node  # else the document's own, or a property
    return {
        key: value if key in ("example", "examples") else _without_titles(value)
        for key, value in node.items()
        if not (is_schema and key == "title")
    }
