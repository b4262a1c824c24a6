"""The keys and channels of the ledger: the one list. The scripts see it as the table ``KEY``."""

from __future__ import annotations

from typing import NamedTuple


class Key(NamedTuple):
    """A key of the ledger, or a family of them: its name, its type in Redis, and what ids follow the name."""

    name: str
    type: str
    of: tuple[str, ...] = ()

    def __call__(self, *ids: str) -> str:
        """Write the key; an id that is empty is left out.

        >>> JOB("a"), SENT("rerankq.bulk", ""), SENT("rerankq.bulk", "tenant"), DEAD()
        ('rerankq:job:a', 'rerankq:sent:rerankq.bulk', 'rerankq:sent:rerankq.bulk:tenant', 'rerankq:dead')
        """
        return ":".join([self.name, *filter(None, ids)])

    @property
    def pattern(self) -> str:
        """The key as a document writes it.

        >>> SENT.pattern
        'rerankq:sent:QUEUE:TENANT'
        """
        return ":".join([self.name, *self.of])


JOB = Key("rerankq:job", "hash", ("ID",))
WAITING = Key("rerankq:waiting", "sorted set", ("QUEUE", "TENANT"))
SENT = Key("rerankq:sent", "sorted set", ("QUEUE", "TENANT"))
TENANTS = Key("rerankq:tenants", "set", ("QUEUE",))
QUEUES = Key("rerankq:queues", "set")
BACKLOG = Key("rerankq:backlog", "hash")
DEADLINES = Key("rerankq:deadlines", "sorted set")
RUNNING = Key("rerankq:running", "sorted set")
ALONE = Key("rerankq:alone", "hash")
ACCUSED = Key("rerankq:accused", "set", ("WORKER",))
DEAD = Key("rerankq:dead", "sorted set")
WORKERS = Key("rerankq:workers", "hash")
SWEEPER = Key("rerankq:sweeper", "string")
CLOCK = Key("rerankq:clock", "string")
TURN = Key("rerankq:turn", "number")
WEBHOOK = Key("rerankq:webhook", "hash", ("ID",))
WEBHOOKS = Key("rerankq:webhooks", "sorted set")

ALL = tuple(value for value in list(globals().values()) if isinstance(value, Key))


def completion_channel(deployment: str, job_id: str) -> str:
    """Name the channel on which the end of a job is published; *deployment* is the prefix of its channels."""
    return f"{deployment}:job:{job_id}"


def cancel_channel(deployment: str) -> str:
    """Name the channel on which workers are told of cancelled jobs."""
    return f"{deployment}:cancel"


def as_lua() -> str:
    """Write the list for the scripts."""
    entries = (f"{key.name.removeprefix('rerankq:')} = '{key.name}'" for key in ALL)
    return f"local KEY = {{{', '.join(entries)}}}\n"
