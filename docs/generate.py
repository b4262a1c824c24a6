"""Fill the tables of the documents from what they describe: models, errors, catalogues, results (``make docs``).

A page marks a table with ``<!-- table: NAME -->`` and ``<!-- end -->``; what stands between is replaced.
With ``--check`` nothing is written, and the exit status is 1 if a page would change.
"""

from __future__ import annotations

import json
import re
import sys
import tomllib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined, to_jsonable_python

from rerankq import catalogue, contract, errors
from rerankq.integrations import reranking
from rerankq.settings import PREFIX, Settings

REPOSITORY = Path(__file__).resolve().parents[1]
PAGES = [REPOSITORY / "README.md", *sorted((REPOSITORY / "docs").glob("*.md"))]

MARKED = re.compile(r"(<!-- table: ([\w -]+) -->\n).*?(<!-- end -->)", re.DOTALL)

# Names of types that a reader of JSON knows.
KINDS = {"string": "string", "number": "number", "integer": "integer", "boolean": "true or false", "null": "null"}
# How the limits of a JSON schema read. pydantic leaves some under its own names.
LIMITS = {
    "minimum": "≥ {}",
    "ge": "≥ {}",
    "exclusiveMinimum": "> {}",
    "maximum": "≤ {}",
    "le": "≤ {}",
    "minLength": "{} characters or more",
    "maxLength": "at most {} characters",
    "minItems": "{} or more",
    "minProperties": "{} or more",
    "pattern": "`{}`",
}


def filled(page: str) -> str:
    """Give a page with every marked table made anew."""
    return MARKED.sub(lambda found: f"{found[1]}{table(found[2])}{found[3]}", page)


def table(name: str) -> str:
    """Make the table of this name."""
    kind, _, of = name.partition(" ")
    rows = TABLES[kind](of)
    lines = [f"| {' | '.join(cells)} |" for cells in rows]
    return "\n".join([lines[0], "|" + "---|" * lines[0].count(" | ") + "---|", *lines[1:]]) + "\n"


def job_fields(name: str) -> Iterator[list[str]]:
    """Rows for what callers write."""
    yield ["field", "type", "default", "limits", "read by", "meaning"]
    for field, schema, info in fields_of(getattr(contract, name)):
        extra: Any = info.json_schema_extra or {}
        yield [
            f"`{field}`",
            typed(schema, extra.get("unit", "")),
            default_of(info),
            limits_of(schema),
            extra.get("read_by", ""),
            as_markdown(info.description),
        ]


def answer_fields(name: str) -> Iterator[list[str]]:
    """Rows for what callers read."""
    yield ["field", "type", "meaning"]
    for field, schema, info in fields_of(getattr(contract, name)):
        extra: Any = info.json_schema_extra or {}
        yield [f"`{field}`", typed(schema, extra.get("unit", "")), as_markdown(info.description)]


def adapter_fields(name: str) -> Iterator[list[str]]:
    """Rows for the options that adapters have in common."""
    yield ["option", "default", "meaning"]
    for field, info in getattr(reranking, name).model_fields.items():
        yield [f"`{field}`", default_of(info), as_markdown(info.description)]


def settings_rows(_: str) -> Iterator[list[str]]:
    """Rows for the settings, by environment variable."""
    yield ["variable", "default", "unit", "limits", "read by", "meaning"]
    for field, schema, info in fields_of(Settings):
        extra: Any = info.json_schema_extra
        choices = typed(schema) if "enum" in json.dumps(schema) else ""
        yield [
            f"`{PREFIX}{field.upper()}`",
            default_of(info) if info.default not in (None, "", []) else "",
            extra["unit"],
            choices or limits_of(schema),
            extra["read_by"],
            as_markdown(info.description),
        ]


def error_rows(_: str) -> Iterator[list[str]]:
    """Rows for the errors, in the order of their tree."""
    yield ["error", "HTTP status", "can a retry help?", "raised when"]
    for kind in vars(errors).values():
        if isinstance(kind, type) and issubclass(kind, errors.RerankqError) and kind is not errors.RerankqError:
            when = (kind.__doc__ or "").removeprefix("Raised when ").rstrip(".")
            yield [f"`{kind.__name__}`", str(kind.http_status), "yes" if kind.retryable else "no", as_markdown(when)]


def profile_rows(_: str) -> Iterator[list[str]]:
    """Rows for the fusion profiles."""
    yield ["profile", "method", "weights", "normalising", "boosts", "token rule", "meaning"]
    tables = tomllib.loads(catalogue.find("fusion.toml").read_text(encoding="utf-8"))["profile"]
    for name, fusion in catalogue.profiles().items():
        said: dict[str, dict[str, Any]] = tables[name]
        normalise = said["normalise"]
        yield [
            f"`{name}`",
            fusion.method,
            listed(said["weights"]),
            listed({signal: rule for signal, rule in normalise.items() if said["weights"].get(signal)}),
            listed(said["boosts"]) or "–",
            fusion.token_rule if fusion.weights.get("token") else "–",
            str(said["description"]),
        ]


def model_rows(_: str) -> Iterator[list[str]]:
    """Rows for the models of the catalogue."""
    yield ["model", "reads at most", "languages", "download", "licence", "choose it for"]
    for name, card in catalogue.models().items():
        yield [
            f"`{name}`",
            f"{card.max_length} tokens",
            ", ".join(card.languages),
            f"{card.size_mb:g} MB",
            card.licence,
            card.choose_when,
        ]


def remote_rows(_: str) -> Iterator[list[str]]:
    """Rows for the models of the catalogue that are on other servers."""
    yield ["`RERANKQ_MODEL`", "dialect", "model there", "posts to", "key in", "scores", "reads at most"]
    for name, card in catalogue.remotes().items():
        yield [
            f"`{name}`",
            card.dialect,
            f"`{card.model}`" if card.model else "its own",
            f"`{card.url}`",
            f"`{card.api_key_env}`" if card.api_key_env else "–",
            "logits" if card.score == "logit" else "probabilities",
            f"{card.max_length} tokens, {card.max_documents} texts a request",
        ]


def figure_rows(_: str) -> Iterator[list[str]]:
    """Rows for the README: what the benchmarks measured, in a few lines."""
    bulk, known, idle = result("throughput.auto"), result("cached"), result("latency")
    urgent, many, chaos, http = result("priorities"), result("scaling"), result("chaos"), result("gateway_load")
    adds_ms = http["http_adds_ms"]
    queued_s = chaos["seconds_from_a_kill_until_its_jobs_are_queued_again"]
    share = many["ratios"]["8 workers ÷ linear"]
    yield ["what", "measured"]
    yield [
        "bulk jobs, bundled model, 50 chunks a job",
        f"{bulk['pairs_per_second']['rerankq']['median']:.0f} pairs/s of {bulk['tokens_per_pair']:.0f} tokens: "
        f"{bulk['ratios']['rerankq ÷ the usual task']:.1f} times a Celery task that calls `CrossEncoder.predict`",
    ]
    yield [
        "pairs whose scores are known",
        f"{known['known_pairs_per_second']['model']['worker']['median']:,.0f} pairs/s".replace(",", " "),
    ]
    yield [
        "one small job on an idle worker",
        f"{idle['beyond_inference_ms']['median']:.0f} ms beyond the model's own time (median)",
    ]
    yield [
        "the same under a backlog of bulk jobs",
        f"95th percentile {urgent['ratios']['p95 under a bulk backlog ÷ idle p95']:g} times the idle one",
    ]
    yield [
        "8 workers; a worker is killed",
        f"{share:.1%} of 8 times one (stub engine); its jobs are queued again after {queued_s['median']:.0f} s, "
        f"{queued_s['greatest']:.0f} s at most",
    ]
    yield [
        f"HTTP, with {http['waiting']} calls waiting",
        f"adds {adds_ms['p50']:.0f} ms to a job (median; 99th percentile {adds_ms['p99']:.0f})",
    ]


def ledger_size_rows(_: str) -> Iterator[list[str]]:
    """Rows for what jobs take in Redis."""
    measured = result("ledger_size")
    characters = measured["characters"]
    yield [
        f"chunks of {characters} characters in a job",
        "a waiting job",
        "waiting jobs in 1 GiB",
        "a ranking",
        "rankings in 1 GiB",
        "a score",
    ]
    for chunks, sizes in measured["by_chunks"].items():
        waiting, done = sizes["waiting_bytes"], sizes["done_bytes"]
        yield [
            chunks,
            size(waiting),
            count(2**30 / waiting),
            size(done),
            count(2**30 / done),
            f"{sizes['score_bytes']:.0f} B",
        ]


def result(name: str) -> dict[str, Any]:
    """Read what a benchmark left."""
    path = REPOSITORY / "benchmarks" / "results" / f"{name}.json"
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found


def size(in_bytes: float) -> str:
    """Write a size as a person would.

    >>> size(1984), size(53_200)
    ('2.0 kB', '53 kB')
    """
    return f"{in_bytes / 1000:.1f} kB" if in_bytes < 10_000 else f"{in_bytes / 1000:.0f} kB"


def count(number: float) -> str:
    """Write a number in two digits, which is what it is worth.

    >>> count(541_234), count(9_871)
    ('540 000', '9 900')
    """
    return f"{float(f'{number:.1e}'):,.0f}".replace(",", " ")


TABLES: dict[str, Callable[[str], Iterable[list[str]]]] = {
    "job": job_fields,
    "answer": answer_fields,
    "adapter": adapter_fields,
    "settings": settings_rows,
    "errors": error_rows,
    "profiles": profile_rows,
    "models": model_rows,
    "remotes": remote_rows,
    "figures": figure_rows,
    "ledger-size": ledger_size_rows,
}


def fields_of(model: type[BaseModel]) -> Iterator[tuple[str, dict[str, Any], Any]]:
    """Each field with its JSON schema and its declaration."""
    schemas = model.model_json_schema(mode="validation")["properties"]
    for name, info in model.model_fields.items():
        yield name, schemas[name], info


def typed(schema: dict[str, Any], unit: str = "") -> str:
    """Say a JSON schema's type in words."""
    return f"{_typed(schema)} ({unit})" if unit else _typed(schema)


def _typed(schema: dict[str, Any]) -> str:  # noqa: PLR0911  # a kind of schema a line
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return "any JSON" if name == "JsonValue" else f"[{name}](#{name.lower()})"
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " or ".join(_typed(part) for part in parts)
    if "enum" in schema:
        return ", ".join(f"`{choice}`" for choice in schema["enum"])
    if "const" in schema:
        return f"`{schema['const']}`"
    if "prefixItems" in schema:
        return f"[{', '.join(_typed(part) for part in schema['prefixItems'])}]"
    if schema.get("type") == "array":
        return f"list of {_typed(schema['items'])}"
    if schema.get("type") == "object":
        return f"object of {_typed(schema.get('propertyNames', {'type': 'string'}))} → " + (
            _typed(schema["additionalProperties"])
        )
    return KINDS[schema["type"]]


def limits_of(schema: dict[str, Any]) -> str:
    """List the limits that a schema sets to a value or to the values in it."""
    if "prefixItems" in schema:  # its length is its type
        schema = {"prefixItems": schema["prefixItems"]}
    found = [said.format(number(schema[key])) for key, said in LIMITS.items() if key in schema]
    inner = [*schema.get("anyOf", ()), *schema.get("prefixItems", ())]
    inner += [schema[key] for key in ("additionalProperties", "items") if isinstance(schema.get(key), dict)]
    return ", ".join(dict.fromkeys([*found, *filter(None, map(limits_of, inner))])).replace("|", "\\|")


def number(value: float | str) -> str:
    """Write a limit as a person would: no digits that say nothing."""
    if isinstance(value, str):
        return value
    return f"{value:g}" if isinstance(value, float) and abs(value) >= 1e15 else f"{value:,.10g}".replace(",", " ")


def default_of(info: Any) -> str:
    """Say a field's default, or that it has none."""
    value = info.get_default(call_default_factory=True)
    if value is PydanticUndefined:
        return "required"
    return f"`{value}`" if value and isinstance(value, str) else f"`{json.dumps(to_jsonable_python(value))}`"


def listed(numbers: dict[str, Any]) -> str:
    """Write a mapping in a cell."""
    return ", ".join(
        f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}" for name, value in numbers.items()
    )


def as_markdown(text: str | None) -> str:
    """Turn a description into a cell: one pair of backquotes, and no bar that would end the cell."""
    return re.sub(r":class:`\.?(\w+)`", r"`\1`", text or "").replace("``", "`").replace("|", "\\|")


def main(arguments: list[str]) -> int:
    """Fill every page, or check that all are filled."""
    changed = []
    for path in PAGES:
        page = path.read_text(encoding="utf-8")
        if (new := filled(page)) != page:
            changed.append(path.name)
            if "--check" not in arguments:
                path.write_text(new, encoding="utf-8")
    sys.stdout.write(f"changed: {', '.join(changed)}\n" if changed else "all tables are up to date\n")
    return 1 if changed and "--check" in arguments else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
