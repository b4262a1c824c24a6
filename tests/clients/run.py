"""Run the clients that people already have against a live gateway with a live worker, and print a table.

    python tests/clients/run.py [NAME ...] [--environments FOLDER] [--json FILE]

Each client has an environment of its own, made once below FOLDER (``.venv-clients``). Exit status 1 if a check failed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import httpx

from rerankq import Client
from rerankq.gateway.keys import hash_of, new_key
from rerankq.local.embedded import free_port
from rerankq.local.stack import Stack, gateway_command
from rerankq.settings import Settings

HERE = Path(__file__).resolve().parent
DEFAULT_FOLDER = HERE.parents[1] / ".venv-clients"
TIMEOUT_S = 600
_MARKS = {True: "ok  ", False: "FAIL"}


def main() -> int:
    """Run the checks of the named clients, or of all."""
    clients = tomllib.loads((HERE / "environments.toml").read_text())
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", choices=[*clients, []], default=[], metavar="NAME")
    parser.add_argument("--environments", type=Path, default=DEFAULT_FOLDER, metavar="FOLDER")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there, too")
    given = parser.parse_args()
    chosen = {name: clients[name] for name in given.names or clients}
    programs = {name: program_of(given.environments / name, client) for name, client in chosen.items()}
    settings = Settings(model="bundled", port=free_port(0), _env_file=None)
    results = []
    with Stack(settings, embedded=True, gateway=True) as stack, Client(stack.settings) as client:
        stack.wait_until_ready(client)
        url = f"http://127.0.0.1:{settings.port}"
        with locked_gateway(stack.settings) as locked:
            about = {**environment_of(url), **locked}
            for name, one in chosen.items():
                results += list(checks(name, one, programs[name], about))
    print(table(results))
    if given.json:
        given.json.write_text(json.dumps(results, indent=1))
    return 0 if all(result["ok"] for result in results) else 1


def program_of(folder: Path, client: dict[str, Any]) -> tuple[Path | str, Path] | None:
    """Make a client's environment; answer what runs its checks, and the folder where they are; None: there is none."""
    if "packages" in client:
        return environment(folder, client["packages"]), HERE
    if not (shutil.which("node") and shutil.which("npm")):
        return None
    stamp, wanted = folder / "packages.txt", "\n".join(client["npm"])
    if not stamp.is_file() or stamp.read_text() != wanted:
        folder.mkdir(parents=True, exist_ok=True)
        subprocess.run(["npm", "install", "--silent", "--prefix", folder, *client["npm"]], check=True)
        stamp.write_text(wanted)
    for program in client["checks"]:
        # Packages are looked for beside the program that imports them.
        shutil.copy(HERE / program, folder / program)
    return "node", folder


def environment(folder: Path, packages: list[str]) -> Path:
    """Make a client's environment, or find the one that was made; answer its Python."""
    python, stamp = folder / "bin/python", folder / "packages.txt"
    wanted = "\n".join(packages)
    if not stamp.is_file() or stamp.read_text() != wanted:
        print(f"Installing {', '.join(packages)}", file=sys.stderr)
        shutil.rmtree(folder, ignore_errors=True)
        subprocess.run([sys.executable, "-m", "uv", "venv", "-q", folder], check=True)
        subprocess.run([sys.executable, "-m", "uv", "pip", "install", "-q", "--python", python, *packages], check=True)
        stamp.write_text(wanted)
    return python


@contextmanager
def locked_gateway(settings: Settings) -> Iterator[dict[str, str]]:
    """Run a second gateway of the deployment, which wants a key; answer what the checks need of it."""
    key, port = new_key(), free_port(0)
    named = {"BROKER_URL": settings.broker, "MODEL": settings.model, "API_KEYS": f"clients:{hash_of(key)}"}
    command = gateway_command(settings.model_copy(update={"port": port}))
    gateway = subprocess.Popen(command, env={**os.environ, **{f"RERANKQ_{one}": named[one] for one in named}})
    try:
        url = f"http://127.0.0.1:{port}"
        ends = time.monotonic() + 60
        while time.monotonic() < ends:
            with suppress(httpx.TransportError):
                httpx.get(f"{url}/health/live")
                break
            time.sleep(0.1)
        yield {"GATEWAY_LOCKED_URL": url, "GATEWAY_KEY": key}
    finally:
        gateway.terminate()
        gateway.wait(30)


def environment_of(url: str) -> dict[str, str]:
    """Tell the checks where the gateway is, and which scores are right: those of a plain request."""
    sys.path.insert(0, str(HERE))
    os.environ.update(GATEWAY_URL=url, GATEWAY_SCORES="[0,0,0,0]", GATEWAY_LOCKED_URL="", GATEWAY_KEY="")
    from checking import DOCUMENTS, QUERY  # noqa: PLC0415 - reads the environment

    answer = httpx.post(f"{url}/rerank", json={"query": QUERY, "docs": DOCUMENTS}, timeout=60)
    answer.raise_for_status()
    told = {"GATEWAY_URL": url, "GATEWAY_SCORES": json.dumps(answer.json()["scores"])}
    return {**os.environ, **told, "GATEWAY_QUERY": QUERY, "GATEWAY_DOCUMENTS": json.dumps(DOCUMENTS)}


def checks(
    name: str, client: dict[str, Any], runs: tuple[Path | str, Path] | None, about: dict[str, str]
) -> Iterator[dict[str, Any]]:
    """Run the checks of a client; answer their results as they come."""
    if runs is None:
        print(f"{name}: skipped, as there is no node or no npm", file=sys.stderr)
        return
    interpreter, folder = runs
    source = client.get("source")
    if source and not os.environ.get(source):
        print(f"{name}: skipped, as {source} does not name a folder with its source", file=sys.stderr)
        return
    for program in client["checks"]:
        done = subprocess.run(
            [interpreter, folder / program], env=about, capture_output=True, text=True, timeout=TIMEOUT_S, check=False
        )
        lines = [json.loads(line[6:]) for line in done.stdout.splitlines() if line.startswith("CHECK ")]
        failed = done.returncode or not lines or not all(line["ok"] for line in lines)
        if failed:
            print(f"{name} {program}:\n{done.stderr[-8000:]}", file=sys.stderr)
        yield from lines
        if done.returncode or not lines:
            yield {"client": name, "what": program, "ok": False, "said": done.stderr.strip()[-200:]}


def table(results: list[dict[str, Any]]) -> str:
    """Write the results, a line each, and how many went through."""
    widths = [max((len(result[key]) for result in results), default=0) for key in ("client", "what")]
    lines = [
        f"{_MARKS[one['ok']]} {one['client']:{widths[0]}}  {one['what']:{widths[1]}}  {one['said']}".rstrip()
        for one in results
    ]
    passed = sum(one["ok"] for one in results)
    return "\n".join([*lines, f"{passed} of {len(results)} checks passed"])


if __name__ == "__main__":
    sys.exit(main())
