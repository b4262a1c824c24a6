"""The deployment files say what they are meant to say: checked against the specification, and against real servers."""

import base64
import json
import os
import re
import shlex
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from fnmatch import fnmatch
from importlib import resources
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import redis
import yaml
from forked_processes import ForkedProcess

from rerankq import catalogue
from rerankq.settings import Settings, read_by

REPOSITORY = Path(__file__).resolve().parents[1]
RESET = object()


class ComposeLoader(yaml.SafeLoader):
    """YAML with the two tags that Compose adds for override files."""


ComposeLoader.add_constructor("!reset", lambda loader, node: RESET)


def load(name: str) -> dict[str, Any]:
    return yaml.load((REPOSITORY / name).read_text(), ComposeLoader)


def merged(below: Any, above: Any) -> Any:
    """Lay one Compose file over another, as far as ours need it: mappings are merged, all else replaced."""
    if not (isinstance(below, dict) and isinstance(above, dict)):
        return above
    both = {**below, **{key: merged(below.get(key), value) for key, value in above.items()}}
    return {key: value for key, value in both.items() if value is not RESET}


GPU = load("docker-compose.yml")
CPU = merged(GPU, load("docker-compose.cpu.yml"))
SERVICES = GPU["services"]


@pytest.fixture(scope="module")
def specification():
    schemas = resources.files("check_jsonschema") / "builtin_schemas" / "vendor"
    schema = json.loads((schemas / "compose-spec.json").read_text())
    kind = jsonschema.validators.validator_for(schema)
    return kind(schema)


@pytest.mark.parametrize("file", [GPU, CPU], ids=["gpu", "cpu"])
def test_the_file_keeps_to_the_compose_specification(specification, file):
    assert [f"{fault.json_path}: {fault.message}" for fault in specification.iter_errors(file)] == []


@pytest.mark.parametrize(
    "planted",
    [
        {"services": {"redis": {"restrat": "always"}}},
        {"services": {"redis": {"ports": "6379"}}},
        {"services": {"redis": {"healthcheck": {"test": 1}}}},
    ],
)
def test_the_specification_finds_a_planted_mistake(specification, planted):
    assert not specification.is_valid(merged(GPU, planted))


def test_every_service_restarts_and_says_how_it_is():
    for name, service in SERVICES.items():
        assert service["restart"] == "unless-stopped", name
        assert {"test", "interval", "timeout", "retries", "start_period"} <= service["healthcheck"].keys(), name


def test_every_port_is_published_on_the_loopback_only():
    ports = [port for service in SERVICES.values() for port in service.get("ports", [])]
    assert len(ports) == 3
    assert all(port.startswith("127.0.0.1:") for port in ports)


def test_no_secret_has_a_default():
    text = (REPOSITORY / "docker-compose.yml").read_text()
    names = set(re.findall(r"\$\{([A-Z_]+)", text))
    assert names == {
        "REDIS_PASSWORD", "FLOWER_BASIC_AUTH", "REDIS_PORT", "FLOWER_PORT", "GATEWAY_PORT",
        "RERANKQ_OPEN_ACCESS", "RERANKQ_ALLOWED_HOSTS",
    }  # fmt: skip
    for secret in ("REDIS_PASSWORD", "FLOWER_BASIC_AUTH"):
        assert f"${{{secret}:?" in text
        assert f"${{{secret}:-" not in text


def test_the_worker_asks_for_a_gpu_and_the_override_does_not():
    (device,) = GPU["services"]["worker"]["deploy"]["resources"]["reservations"]["devices"]
    assert device["capabilities"] == ["gpu"]
    assert "deploy" not in CPU["services"]["worker"]
    assert CPU["services"]["worker"]["build"]["args"]["TORCH_INDEX"].endswith("/cpu")
    assert CPU["services"]["worker"]["environment"] == GPU["services"]["worker"]["environment"]


def test_whoever_needs_redis_waits_until_it_answers():
    for name in ("worker", "gateway", "flower"):
        needs = SERVICES[name]["depends_on"]
        assert {need: how["condition"] for need, how in needs.items()} == {
            "redis": "service_healthy",
            "redis-cache": "service_healthy",
        }


def test_the_environment_is_made_of_real_settings_and_points_each_role_at_its_server():
    environment = SERVICES["worker"]["environment"]
    ours = {name.removeprefix("RERANKQ_").lower() for name in environment if name.startswith("RERANKQ_")}
    assert ours <= Settings.model_fields.keys()
    hosts = {role: re.search(r"@([a-z-]+):6379/(\d)", environment[f"RERANKQ_{role}_URL"]).groups() for role in ROLES}
    assert hosts == ROLES


def test_every_setting_that_workers_read_is_passed_on_to_them():
    environment = SERVICES["worker"]["environment"]
    passed_on = {name.removeprefix("RERANKQ_").lower() for name in environment}
    assert {name for name in Settings.model_fields if read_by(name) in {"worker", "both"}} - passed_on == set()


def test_a_worker_in_a_container_may_ask_every_server_of_the_catalogue():
    keys = {card.api_key_env for card in catalogue.remotes().values()} - {""}
    assert keys <= set(SERVICES["worker"]["environment"])
    assert "[worker,remote," in (REPOSITORY / "docker/worker.Dockerfile").read_text()


def test_every_setting_that_the_gateway_reads_is_passed_on_to_it():
    environment = SERVICES["gateway"]["environment"]
    passed_on = {name.removeprefix("RERANKQ_").lower() for name in environment}
    assert passed_on <= Settings.model_fields.keys()
    assert {name for name in Settings.model_fields if read_by(name) != "worker"} - passed_on == set()


def test_the_gateway_listens_to_all_inside_its_container_only():
    service = SERVICES["gateway"]
    assert service["environment"]["RERANKQ_HOST"] == "0.0.0.0"
    assert service["ports"] == ["127.0.0.1:${GATEWAY_PORT:-8080}:8080"]
    assert "/health/live" in service["healthcheck"]["test"][-1]
    dockerfile = (REPOSITORY / "docker/gateway.Dockerfile").read_text()
    assert "'.[gateway,cli]'" in dockerfile
    assert "torch" not in dockerfile.replace("no torch", "")


ROLES = {"BROKER": ("redis", "0"), "LEDGER": ("redis", "1"), "CACHE": ("redis-cache", "0")}


def test_what_must_last_is_on_a_named_volume():
    assert "ledger:/data" in SERVICES["redis"]["volumes"]
    assert "models:/var/lib/rerankq/models" in SERVICES["worker"]["volumes"]
    assert "/var/lib/rerankq/models" in (REPOSITORY / "docker/worker.Dockerfile").read_text()
    assert "files:/var/lib/rerankq/files" in SERVICES["gateway"]["volumes"]
    assert SERVICES["gateway"]["environment"]["RERANKQ_FILES_DIR"] == "/var/lib/rerankq/files"
    assert "/var/lib/rerankq/files" in (REPOSITORY / "docker/gateway.Dockerfile").read_text()
    assert GPU["volumes"].keys() == {"files", "ledger", "models"}


def test_every_file_that_compose_names_exists():
    for service in SERVICES.values():
        for volume in service.get("volumes", []):
            source = volume.split(":")[0]
            assert not source.startswith(".") or (REPOSITORY / source).is_file(), volume
        if "build" in service:
            assert (REPOSITORY / service["build"]["context"] / service["build"]["dockerfile"]).is_file()


def dockerfiles() -> list[Path]:
    return sorted((REPOSITORY / "docker").glob("*.Dockerfile"))


def copied(dockerfile: Path) -> list[str]:
    """What a Dockerfile copies out of the repository."""
    lines = dockerfile.read_text().replace("\\\n", " ").splitlines()
    copies = [shlex.split(line)[1:] for line in lines if line.startswith("COPY ")]
    return [source for words in copies if not words[0].startswith("--from") for source in words[:-1]]


@pytest.mark.parametrize("dockerfile", dockerfiles(), ids=lambda path: path.name)
def test_every_file_that_a_dockerfile_copies_exists_and_is_sent_to_the_builder(dockerfile):
    ignored = (REPOSITORY / ".dockerignore").read_text().splitlines()
    assert "*" in ignored
    kept = [line[1:] for line in ignored if line.startswith("!")]
    assert copied(dockerfile)
    for source in copied(dockerfile):
        assert (REPOSITORY / source).exists(), source
        assert any(fnmatch(source, pattern) for pattern in kept), source


@pytest.mark.parametrize("dockerfile", dockerfiles(), ids=lambda path: path.name)
def test_an_image_does_not_run_as_root_and_installs_pinned_versions(dockerfile):
    text = dockerfile.read_text().replace("\\\n", " ")
    assert re.search(r"^USER rerankq$", text, re.MULTILINE)
    installs = [part for line in text.splitlines() for part in line.split("&&") if "pip install" in part]
    assert installs
    assert all("--constraint constraints.txt" in install for install in installs)


def test_every_build_argument_is_known_to_its_dockerfile():
    build = CPU["services"]["worker"]["build"]
    text = (REPOSITORY / build["dockerfile"]).read_text()
    assert all(re.search(rf"^ARG {argument}\b", text, re.MULTILINE) for argument in build["args"])


@pytest.fixture(params=["ledger", "cache"])
def configured_server(request, tmp_path, redis_binary_each_version):
    """A real server with the configuration that the deployment mounts, on a socket instead of a port."""
    path = tmp_path / "redis.sock"
    settings = ["--port", "0", "--unixsocket", str(path), "--dir", str(tmp_path), "--logfile", "log"]
    configuration = REPOSITORY / "conf" / f"redis-{request.param}.conf"
    with subprocess.Popen([redis_binary_each_version, configuration, *settings, "--requirepass", "secret"]) as server:
        try:
            with redis.Redis(unix_socket_path=str(path), password="secret", decode_responses=True) as connection:
                assert eventually(lambda: answers(connection) or server.poll() is not None)
                assert server.poll() is None, "the server refused its configuration"
                yield request.param, connection
        finally:
            server.terminate()


def answers(connection) -> bool:
    try:
        return connection.ping()
    except redis.ConnectionError:
        return False


def test_each_role_keeps_or_forgets_as_it_must(configured_server):
    role, connection = configured_server
    names = ("appendonly", "appendfsync", "maxmemory-policy", "save")
    set_to = {name: connection.config_get(name)[name] for name in names}
    if role == "ledger":
        assert set_to == {"appendonly": "yes", "appendfsync": "everysec", "maxmemory-policy": "noeviction", "save": ""}
    else:
        assert {**set_to, "appendfsync": ""} == {
            "appendonly": "no",
            "appendfsync": "",
            "maxmemory-policy": "allkeys-lfu",
            "save": "",
        }
    assert int(connection.config_get("maxmemory")["maxmemory"]) > 0


def test_flower_knows_every_option_of_its_file():
    script = (
        "import json, sys; from tornado.options import options; import flower.options; "
        "before = set(options); options.parse_config_file(sys.argv[1]); "
        "print(json.dumps([options.max_tasks, options.purge_offline_workers, options.tasks_columns.split(',')]))"
    )
    configuration = REPOSITORY / "conf" / "flower.py"
    run = subprocess.run([sys.executable, "-c", script, configuration], capture_output=True, text=True, check=True)
    max_tasks, purge_s, columns = json.loads(run.stdout)
    assert (max_tasks, purge_s) == (20_000, 300)
    assert {"uuid", "args", "state", "result", "worker"} <= set(columns)
    # tornado passes over names that it does not know, so a misspelt one would do nothing.
    known = set(re.findall(r"^(\w+) = ", configuration.read_text(), re.MULTILINE))
    assert known == {"max_tasks", "purge_offline_workers", "tasks_columns"}


@pytest.fixture
def flower(redis_url):
    """Flower as its image starts it, but for the address; gives its URL."""
    (command,) = re.findall(r"^CMD (.+)$", (REPOSITORY / "docker/flower.Dockerfile").read_text(), re.MULTILINE)
    celery, *options = [word.replace("/etc/rerankq", str(REPOSITORY / "conf")) for word in json.loads(command)]
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    where = [f"--port={port}", "--address=127.0.0.1"]
    environment = {**os.environ, "RERANKQ_BROKER_URL": redis_url, "FLOWER_BASIC_AUTH": "me:secret"}
    with ForkedProcess(["-m", celery, *options, *where], environment | {"RERANKQ_MODEL": "stub"}) as server:
        try:
            yield f"http://127.0.0.1:{port}"
        finally:
            server.terminate()


def status_of(url: str, *, password: str = "") -> int:
    opener = urllib.request.build_opener()
    if password:
        opener.addheaders = [("Authorization", "Basic " + base64.b64encode(f"me:{password}".encode()).decode())]
    try:
        with opener.open(url, timeout=30) as answer:
            return answer.status
    except urllib.error.HTTPError as refused:
        with refused:
            return refused.code
    except OSError:
        return 0


def test_flower_starts_from_the_light_app_and_asks_for_the_password(flower):
    assert eventually(lambda: status_of(f"{flower}/healthcheck") == 200)
    assert status_of(f"{flower}/tasks") == 401
    assert status_of(f"{flower}/tasks", password="wrong") == 401
    assert status_of(f"{flower}/tasks", password="secret") == 200
    for path in ("/api/tasks", "/api/workers", "/workers", "/broker"):
        assert status_of(flower + path) == 401, path


def eventually(fact, *, within_s: float = 60) -> bool:
    deadline = time.monotonic() + within_s
    while not fact():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.05)
    return True
