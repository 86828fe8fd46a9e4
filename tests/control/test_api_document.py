"""The OpenAPI document that is checked in is what the code says.

Compared by what it means to a client, so that another version of the framework, which words a schema differently, breaks nothing.
"""

import copy
import json
import re
import subprocess
import sys
from collections.abc import Callable
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

DEADLINE_SECONDS = 30
ANEW = "python -P -m migrate.api > migrate/api/openapi.json"
KEPT = Path(str(resources.files("migrate.api"))) / "openapi.json"
SCHEMA_WORDS = (
    "$ref",
    "const",
    "contentMediaType",
    "description",
    "enum",
    "format",
    "maximum",
    "maxLength",
    "minimum",
    "minLength",
    "pattern",
)
SCHEMAS_WITHIN = ("additionalProperties", "contentSchema", "items", "propertyNames")


def meaning(schema: Any) -> Any:
    """Of a schema: what it lets through and what it says, in one form of those that mean the same."""
    if isinstance(schema, bool):
        return schema
    described = {word: schema[word] for word in ("description",) if word in schema}
    if alternatives := schema.get("anyOf", schema.get("oneOf")):
        return {"any": sorted((meaning(one) for one in alternatives), key=repr), **described}
    types = schema.get("type", [])
    if isinstance(types, list) and len(types) > 1:
        rest = {word: told for word, told in schema.items() if word not in ("description", "title")}
        return meaning({"anyOf": [{**rest, "type": one} for one in types], **described})
    told = {word: schema[word] for word in SCHEMA_WORDS if word in schema}
    if "const" in told:
        told["enum"] = [told.pop("const")]
    within = {word: meaning(schema[word]) for word in SCHEMAS_WITHIN if schema.get(word) not in (None, True, {})}
    return {
        **told,
        **within,
        "type": types if "enum" not in told else [],
        "properties": {name: meaning(one) for name, one in schema.get("properties", {}).items()},
        "required": sorted(schema.get("required", [])),
        "items_in_order": [meaning(one) for one in schema.get("prefixItems", [])],
    }


def contract(document: Any) -> Any:
    """What a client can rely on."""
    return {
        "paths": {
            f"{method} {path}": operation_contract(operation)
            for path, operations in document["paths"].items()
            for method, operation in operations.items()
        },
        "schemas": {name: meaning(schema) for name, schema in document["components"]["schemas"].items()},
    }


def operation_contract(operation: Any) -> Any:
    parameters = {
        f"{one['in']} {one['name'].lower()}": {
            "required": one.get("required", False),
            "schema": meaning(one["schema"]),
            "description": one.get("description"),
        }
        for one in operation.get("parameters", [])
    }
    return {
        **{word: operation.get(word) for word in ("operationId", "summary", "description", "tags")},
        "parameters": parameters,
        "body": contents(operation.get("requestBody", {})),
        "responses": {
            status: {"description": one["description"], "headers": sorted(one.get("headers", {})), "content": contents(one)}
            for status, one in operation["responses"].items()
        },
    }


def contents(of: Any) -> Any:
    return {
        media_type: {word: meaning(one[word]) for word in ("schema", "itemSchema") if word in one}
        for media_type, one in of.get("content", {}).items()
    }


@pytest.fixture(scope="module")
def document() -> Any:
    return json.loads(KEPT.read_text())


def test_document_is_what_the_code_says(document: Any, tmp_path: Path) -> None:
    command = [sys.executable, "-P", "-m", "migrate.api"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=DEADLINE_SECONDS, check=True)
    assert contract(json.loads(made.stdout)) == contract(document), f"make it anew: {ANEW}"


def test_every_operation_says_what_it_does_and_how_it_refuses(document: Any) -> None:
    operations = [one for path in document["paths"].values() for one in path.values()]
    assert len({one["operationId"] for one in operations}) == len(operations) == 15
    for operation in operations:
        assert re.fullmatch("[a-z]+[A-Za-z]+", operation["operationId"])
        assert operation["summary"]
        assert {"500", "503"} <= operation["responses"].keys()
        for status, response in operation["responses"].items():
            assert response["description"] not in ("", "Successful Response", "Validation Error")
            if status >= "400":
                [(media_type, content)] = response["content"].items()
                assert media_type == "application/problem+json"
                assert content["schema"] == {"$ref": "#/components/schemas/Problem"}
                assert content["example"].keys() == document["components"]["schemas"]["Problem"]["properties"].keys()
                assert content["example"]["status"] == int(status)


def set_in(document: Any, path: str, value: object) -> None:
    *keys, last = path.split(" ")
    for key in keys:
        document = document[key]
    document[last] = value


def limit_of(document: Any) -> Any:
    return next(one for one in document["paths"]["/v1/migrations"]["get"]["parameters"] if one["name"] == "limit")


CHANGES: dict[str, Callable[[Any], object]] = {
    "an operation goes": lambda d: d["paths"].pop("/v1/health"),
    "its id changes": lambda d: set_in(d, "paths /v1/health get operationId", "health"),
    "its words change": lambda d: set_in(d, "paths /v1/health get description", "Whether."),
    "a status goes": lambda d: d["paths"]["/v1/health"]["get"]["responses"].pop("503"),
    "a media type changes": lambda d: set_in(d, "paths /v1/health get responses 200 content", {"text/plain": {}}),
    "a parameter goes": lambda d: d["paths"]["/v1/migrations"]["get"]["parameters"].pop(),
    "a bound changes": lambda d: set_in(limit_of(d), "schema maximum", 201),
    "a field goes": lambda d: d["components"]["schemas"]["GuestInfo"]["properties"].pop("pid"),
    "a field may be missing": lambda d: d["components"]["schemas"]["GuestInfo"]["required"].pop(),
    "a type changes": lambda d: set_in(d, "components schemas GuestInfo properties pid type", "string"),
    "a value is new": lambda d: d["components"]["schemas"]["GuestState"]["enum"].append("asleep"),
    "a header goes": lambda d: d["paths"]["/v1/migrations"]["post"]["responses"]["201"].pop("headers"),
    "an event goes": lambda d: d["components"]["schemas"]["Event"]["oneOf"].pop(),
}
REWORDINGS: dict[str, Callable[[Any], object]] = {
    "another version": lambda d: set_in(d, "openapi", "3.3.0"),
    "a title": lambda d: set_in(d, "components schemas GuestInfo title", "Guest Info"),
    "two types at once": lambda d: set_in(
        d, "components schemas GuestInfo properties migration_id", reworded(d["components"]["schemas"]["GuestInfo"])
    ),
    "a value as an enumeration": lambda d: set_in(
        d, "components schemas Health properties status", {"type": "string", "enum": ["ready"]}
    ),
}


def reworded(guest_info: Any) -> Any:
    field = guest_info["properties"]["migration_id"]
    assert field["anyOf"] == [{"type": "string"}, {"type": "null"}]
    return {"type": ["string", "null"], "description": field["description"]}


@pytest.mark.parametrize("change", CHANGES)
def test_a_change_is_seen(document: Any, change: str) -> None:
    changed = copy.deepcopy(document)
    CHANGES[change](changed)
    assert contract(changed) != contract(document)


@pytest.mark.parametrize("rewording", REWORDINGS)
def test_a_rewording_is_not(document: Any, rewording: str) -> None:
    changed = copy.deepcopy(document)
    REWORDINGS[rewording](changed)
    assert changed != document
    assert contract(changed) == contract(document)
