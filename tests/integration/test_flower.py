"""Flower as the README starts it: what it shows of the broker, and that revoking a job there cancels it."""

import base64
import os
import re
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from rerankq import Client, RerankJob
from rerankq.settings import Settings

REPOSITORY = Path(__file__).resolve().parents[2]


@pytest.fixture
def start_flower() -> Iterator[Callable[..., str]]:
    """Start Flower with the command in docs/deploy.md; answers its address once it is there."""
    (command,) = set(
        re.findall(r"celery (-A rerankq\.broker flower [^`]+)`", (REPOSITORY / "docs/deploy.md").read_text())
    )
    running = []

    def start(url: str, **environment: str) -> str:
        with socket.create_server(("127.0.0.1", 0)) as probe:
            port = probe.getsockname()[1]
        words = [sys.executable, "-m", "celery", *command.split(), f"--port={port}", "--address=127.0.0.1"]
        clean = {name: value for name, value in os.environ.items() if not name.startswith(("RERANKQ_", "FLOWER_"))}
        clean |= {"RERANKQ_BROKER_URL": url, **environment}
        running.append(subprocess.Popen(words, env=clean, cwd=REPOSITORY, stderr=subprocess.DEVNULL))
        address = f"http://127.0.0.1:{port}"
        for _ in range(600):
            if ask(f"{address}/healthcheck")[0] == 200:
                return address
            assert running[-1].poll() is None
            time.sleep(0.1)
        return pytest.fail("Flower did not start")

    yield start
    for flower in running:
        flower.terminate()
        flower.wait(30)


def ask(url: str, *, user: str = "", data: bytes | None = None) -> tuple[int, str]:
    request = urllib.request.Request(url, data=data)
    if user:
        request.add_header("Authorization", "Basic " + base64.b64encode(user.encode()).decode())
    try:
        with urllib.request.urlopen(request, timeout=60) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code, refused.read().decode()
    except OSError:
        return 0, ""


def test_revoking_with_the_password_cancels_a_job_and_without_one_is_refused(
    redis_url: str, start_worker: Callable, start_flower: Callable, wait_until: Callable
):
    start_worker(url=redis_url, RERANKQ_MODEL="stub:1", RERANKQ_MAX_BATCH_TOKENS="16")
    with Client(Settings(_env_file=None, broker_url=redis_url, model="stub")) as client:
        job = client.submit(RerankJob(query="slow", chunks=[f"answer {number}" for number in range(60)]))
        assert ask(f"{start_flower(redis_url)}/api/task/revoke/{job}", data=b"")[0] == 401
        flower = start_flower(redis_url, FLOWER_BASIC_AUTH="me:secret")
        assert ask(f"{flower}/api/task/revoke/{job}", data=b"")[0] == 401
        assert client.status(job).state in {"queued", "running"}
        status, said = ask(f"{flower}/api/task/revoke/{job}", user="me:secret", data=b"")
        assert (status, "Revoked" in said) == (200, True)
        wait_until(lambda: client.status(job).state == "cancelled", 60)
        status, page = ask(f"{flower}/broker", user="me:secret")
        assert (status, "rerankq.interactive" in page) == (200, True)
        assert redis_url.split(":")[2].split("@", maxsplit=1)[0] not in page, "the broker's password"
