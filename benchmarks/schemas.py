"""Schemas that grammars are asked to hold: some of ours, and the JSON Schema Test Suite's."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from report import Result, say

DRAFT = "draft2020-12"

STRING, INTEGER, NUMBER = {"type": "string"}, {"type": "integer"}, {"type": "number"}


def closed(**properties: Any) -> Result:
    """An object with these properties, all required, and no others."""
    return {
        "type": "object",
        "properties": properties,
        "required": list(properties),
        "additionalProperties": False,
    }


COLOURS = {"enum": ["crimson", "chartreuse", "cornflower blue", "burnt sienna"]}
LINE = closed(
    sku=STRING,
    quantity={"type": "integer", "minimum": 1, "maximum": 999},
    price=NUMBER,
    colour=COLOURS,
    notes={"anyOf": [STRING, {"type": "null"}]},
)
ADDRESS = closed(street=STRING, city=STRING, country={"enum": ["CN", "DE", "FR", "JP", "US"]})
SCHEMAS = {
    "three fields": closed(name=STRING, age=INTEGER, member={"type": "boolean"}),
    "nested order": closed(
        id=STRING,
        status={"enum": ["new", "paid", "shipped", "returned"]},
        billing=ADDRESS,
        shipping=ADDRESS,
        lines={"type": "array", "items": LINE, "minItems": 1},
        tags={"type": "array", "items": {"type": "string", "maxLength": 20}, "maxItems": 5},
    ),
    "100 fields": closed(
        **{
            f"field_{i}": (STRING, INTEGER, NUMBER, COLOURS, {"type": "boolean"})[i % 5]
            for i in range(100)
        }
    ),
    "recursive tree": {
        "$defs": {
            "node": closed(
                value=NUMBER, children={"type": "array", "items": {"$ref": "#/$defs/node"}}
            )
        },
        "$ref": "#/$defs/node",
    },
}
MEASURED = "nested order"


# The suite ---------------------------------------------------------------------------------


def fetch_suite(folder: Path) -> Path:
    """The suite from the source distribution of jsonschema, which carries it."""
    say("fetch the JSON Schema Test Suite, in the source of jsonschema")
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder)]
    subprocess.run([*pip, "--no-binary", "jsonschema", "jsonschema"], check=True, stdout=sys.stderr)
    (archive,) = folder.glob("jsonschema-*.tar.gz")
    with tarfile.open(archive) as tar:
        tar.extractall(folder, filter="data")
    return next(folder.glob("jsonschema-*/json"))


TYPES = {
    "number": "maximum minimum exclusiveMaximum exclusiveMinimum multipleOf",
    "string": "maxLength minLength pattern format",
    "array": "items prefixItems maxItems minItems uniqueItems contains minContains maxContains",
    "object": "properties required additionalProperties patternProperties propertyNames "
    "minProperties maxProperties dependentRequired dependentSchemas",
}
KINDS: dict[str, Any] = {"number": (int, float), "string": str, "array": list, "object": dict}


def typed_group(group: Result) -> Result | None:
    """The group with the one type that its schema's keywords are of, if they are of one."""
    schema = group["schema"]
    if not isinstance(schema, dict):
        return None
    found = {kind for kind, words in TYPES.items() if schema.keys() & set(words.split())}
    if len(found) != 1 or "type" in schema or '"#"' in json.dumps(schema):
        return None
    (kind,) = found
    tests = [
        test
        for test in group["tests"]
        if isinstance(test["data"], KINDS[kind]) and not isinstance(test["data"], bool)
    ]
    return {"schema": {**schema, "type": kind}, "tests": tests} if tests else None


def read_suite(folder: Path) -> dict[str, dict[str, list[Result]]]:
    """Its groups by part and by file."""

    def groups(inner: str) -> dict[str, list[Result]]:
        files = sorted((folder / "tests" / DRAFT / inner).glob("*.json"))
        if not files:
            raise SystemExit(f"no tests of {DRAFT} in the folder {folder.name}")
        return {file.stem: json.loads(file.read_text("utf-8")) for file in files}

    def typed(files: dict[str, list[Result]]) -> dict[str, list[Result]]:
        found = {name: list(map(typed_group, each)) for name, each in files.items()}
        return {
            name: [group for group in each if group] for name, each in found.items() if any(each)
        }

    suite = groups("")
    annotations = {"format": suite["format"]}  # where no format is asserted
    return {
        "suite": suite,
        "typed": typed({name: each for name, each in suite.items() if name not in annotations}),
        "formats": typed(groups("optional/format")),
    }


def spellings(value: Any, separators: tuple[str, str] = (",", ":")) -> list[bytes]:
    """JSON of the value as it is, then with its keys in other orders, up to 120 of them."""

    def orders(value: Any) -> Iterator[Any]:
        if isinstance(value, dict):
            for keys in itertools.permutations(value):
                for inner in itertools.product(*(list(orders(value[key])) for key in keys)):
                    yield dict(zip(keys, inner, strict=True))
        elif isinstance(value, list):
            for items in itertools.product(*(list(orders(item)) for item in value)):
                yield list(items)
        else:
            yield value

    dump = json.JSONEncoder(separators=separators, ensure_ascii=False).encode
    found = itertools.islice(orders(value), 120)
    return list(dict.fromkeys(dump(each).encode("utf-8", "surrogatepass") for each in found))
