"""``rerankq key``: make an API key for the gateway."""

from __future__ import annotations

from typing import Annotated

import typer
from pydantic import ValidationError

from ..contract import Priority
from ..rescoring.inputs import InputFault
from .options import Json
from .render import print_json


def key(  # noqa: PLR0917 - typer reads them as options
    name: Annotated[str, typer.Argument(metavar="NAME", help="What the key is called: letters, digits, dots, dashes.")],
    tenant: Annotated[
        str | None, typer.Option(help="The tenant of all its jobs; '*': it may name any. Default: NAME.")
    ] = None,
    priority: Annotated[str, typer.Option(help="The most urgent priority of its jobs: interactive or bulk.")] = (
        "interactive"
    ),
    operator: Annotated[bool, typer.Option("--operator", help="It may see metrics and dead jobs.")] = False,
    requests_per_minute: Annotated[int | None, typer.Option(help="Requests in a minute. Default: no limit.")] = None,
    pairs_per_minute: Annotated[int | None, typer.Option(help="Pairs in a minute. Default: no limit.")] = None,
    tokens_per_minute: Annotated[int | None, typer.Option(help="Tokens in a minute, about. Default: no limit.")] = None,
    concurrent: Annotated[
        int | None, typer.Option(help="Calls that wait for a ranking at a time; others wait. Default: no limit.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Make an API key for the gateway. Prints the key, once, and the entry for the file that RERANKQ_API_KEYS names."""
    # Here, not at the top: the rest of the command line does without.
    from ..gateway.keys import ApiKey, entry_of, hash_of, new_key  # noqa: PLC0415

    made = new_key()
    try:
        given: Priority = priority  # type: ignore[assignment]  # checked by the model
        entry = ApiKey(
            name=name,
            hash=hash_of(made),
            tenant=tenant,
            priority=given,
            operator=operator,
            requests_per_minute=requests_per_minute,
            pairs_per_minute=pairs_per_minute,
            tokens_per_minute=tokens_per_minute,
            concurrent=concurrent,
        )
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        raise InputFault(f"{first['loc'][0]}: {first['msg']}") from None
    if as_json:
        print_json({"key": made, **entry.model_dump(exclude_none=True)})
        return
    print(f"# The key, shown this once; its caller sends it as Authorization: Bearer KEY\n{made}\n")
    alone = not entry.model_dump(exclude={"name", "hash"}, exclude_defaults=True)
    instead = f"; or RERANKQ_API_KEYS={entry.name}:{entry.hash}" if alone else ""
    print(f"# For the file that RERANKQ_API_KEYS names{instead}")
    print(entry_of(entry))
