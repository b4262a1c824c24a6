"""The record of jobs at work: against a plain table, after SIGKILL, and whatever is done to its file."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq_worker import crash_record
from rerankq_worker.crash_record import KEPT_S, CrashRecord, CrashRecords, waiting_jobs

LEDGER = "redis://ledger/1"
STEPS = st.lists(
    st.tuples(st.sampled_from(["begin", "works", "waits", "on device", "off device", "end"]), st.integers(0, 5)),
    max_size=60,
)


def played(record: CrashRecord, slots: int, steps: list[tuple[str, int]]) -> list[tuple[str, int]]:
    """Play steps on a record and on a plain table of jobs; answers what the table says only waits."""
    table: dict[str, dict] = {}
    for fence, (what, number) in enumerate(steps, 2**50):
        name = f"jöb-{number}"
        if what == "begin":
            if name not in table:
                recorded = sum(job["recorded"] for job in table.values()) < slots
                table[name] = {
                    "slot": record.begin(name, fence), "fence": fence, "works": True, "device": False,
                    "recorded": recorded,
                }  # fmt: skip
        elif name in table:
            job = table[name]
            match what:
                case "works" | "waits":
                    job["works"] = what == "works"
                    job["slot"].set_working(job["works"])
                case "on device" | "off device":
                    job["device"] = what == "on device"
                    job["slot"].set_on_device(job["device"])
                case "end":
                    record.end(table.pop(name)["slot"])
        for job in table.values():
            assert job["slot"].at_work == (job["works"] or job["device"])
            assert job["slot"].on_device == job["device"]
    return sorted(
        (name, job["fence"])
        for name, job in table.items()
        if job["recorded"] and not job["works"] and not job["device"]
    )


@given(slots=st.integers(1, 4), steps=STEPS)
def test_a_record_names_the_jobs_that_neither_work_nor_are_on_the_device(slots: int, steps: list[tuple[str, int]]):
    record = CrashRecord(slots)
    expected = played(record, slots, steps)
    assert sorted(waiting_jobs(bytes(record._buffer), "")) == expected


@given(steps=STEPS, data=st.data())
def test_a_damaged_record_clears_no_job_of_suspicion(steps: list[tuple[str, int]], data: st.DataObject):
    record = CrashRecord(4)
    expected = set(played(record, 4, steps))
    content = bytearray(record._buffer)
    how = data.draw(st.sampled_from(["cut", "longer", "zeros", "bytes"]))
    first = data.draw(st.integers(0, len(content) - 1))
    last = data.draw(st.integers(first + 1, len(content)))
    match how:
        case "cut":
            del content[first:]
        case "longer":
            content += b"\0" * last
        case "zeros":
            content[first:last] = bytes(last - first)
        case "bytes":
            # None is a flag of a job.
            content[first : first + 3] = data.draw(
                st.binary(min_size=3, max_size=3).filter(lambda b: not set(b) & set(b"UWD-"))
            )
    assert set(waiting_jobs(bytes(content), "")) <= expected


@pytest.mark.parametrize("at", [0, 10, 49, 52])
def test_a_record_with_a_changed_header_is_not_read(at: int):
    record = CrashRecord(1)
    record.begin("a", 1).set_working(False)
    content = bytearray(record._buffer)
    assert waiting_jobs(bytes(content), "") == [("a", 1)]
    content[at] ^= 1
    assert waiting_jobs(bytes(content), "") == []


def test_a_record_of_another_boot_is_not_read():
    # Its pages may have been lost with the machine.
    content = crash_record._new_record(0, "before") + b""
    record = CrashRecord(1, bytearray(crash_record._new_record(1, "before")))
    record.begin("a", 1).set_working(False)
    assert waiting_jobs(bytes(record._buffer), "before") == [("a", 1)]
    assert waiting_jobs(bytes(record._buffer), "after") == []
    assert waiting_jobs(content, "before") == []


def test_a_job_that_is_being_written_down_is_not_read():
    record = CrashRecord(1)
    slot = record.begin("a job before", 1)
    slot.set_working(False)
    record.end(slot)
    seen: list[list] = []

    class Watched(bytearray):
        def __setitem__(self, key, value) -> None:
            super().__setitem__(key, value)
            seen.append(waiting_jobs(bytes(self), ""))

    slot._buffer = Watched(record._buffer)
    slot.fill("b", 2)
    assert seen == [[]] * 4
    assert slot.at_work


def test_jobs_beyond_the_slots_or_with_long_ids_are_at_work_and_not_in_the_record():
    record = CrashRecord(1)
    first = record.begin("x" * 1_000, 1)
    slot = record.begin("a", 2)
    beyond = record.begin("b", 3)
    for one in (first, beyond):
        assert one.at_work
        one.set_working(False)
        record.end(one)
    slot.set_working(False)
    assert waiting_jobs(bytes(record._buffer), "") == [("a", 2)]
    record.end(slot)
    record.begin("c", 4).set_working(False)
    assert waiting_jobs(bytes(record._buffer), "") == [("c", 4)], "its slot is used again"


@pytest.fixture
def records(tmp_path: Path) -> CrashRecords:
    return CrashRecords(LEDGER, tmp_path / "records")


HOLDING = """
import sys
from pathlib import Path
from rerankq_worker.crash_record import CrashRecords
record = CrashRecords(sys.argv[1], Path(sys.argv[2])).create("host:1:a/b", 8)
for number in range(3):
    slot = record.begin(f"job-{number}", number)
    slot.set_working(number == 0)
    slot.set_on_device(number == 1)
print(flush=True)
input()
"""


@pytest.fixture
def worker(tmp_path: Path) -> Iterator[subprocess.Popen]:
    """A process that holds three jobs: one works, one is on the device, one waits."""
    command = [sys.executable, "-c", HOLDING, LEDGER, str(tmp_path / "records")]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        yield process
        process.kill()


def test_the_record_of_a_killed_process_tells_what_only_waited_and_that_it_has_ended(
    records: CrashRecords, worker: subprocess.Popen
):
    assert records.ended() == []
    worker.send_signal(signal.SIGSTOP)
    os.waitid(os.P_PID, worker.pid, os.WSTOPPED)
    assert records.ended() == [], "it is only paused"
    worker.kill()
    worker.wait()
    assert records.ended() == ["host:1:a/b"]
    assert records.waiting("host:1:a/b") == [("job-2", 2)]
    assert CrashRecords("redis://another/1", records._given).ended() == [], "of this ledger alone"
    records.remove("host:1:a/b")
    records.remove("host:1:a/b")
    assert records.ended() == records.waiting("host:1:a/b") == []


def test_the_record_of_a_process_that_is_known_to_have_ended_is_read_though_a_child_keeps_it_locked(
    records: CrashRecords,
):
    record = records.create("w", 2)
    record.begin("a", 1).set_working(False)
    assert records.ended() == []
    assert records.waiting("w") == [("a", 1)]


def test_a_record_is_removed_at_a_normal_end_and_left_if_a_job_is_left(records: CrashRecords):
    tidy, other = records.create("tidy", 1), records.create("other", 1)
    tidy.end(tidy.begin("a", 1))
    other.begin("b", 2)
    for record in (tidy, other):
        record.close()
    assert records.ended() == ["other"]
    tidy.close()


def unsafe(how: str, folder: Path, elsewhere: Path) -> None:
    elsewhere.mkdir(mode=0o700)
    match how:
        case "a link":
            folder.symlink_to(elsewhere)
        case "open to others":
            folder.mkdir()
            folder.chmod(0o755)
        case "a file":
            folder.touch(mode=0o600)
        case "nowhere":
            folder.parent.rmdir()


@pytest.mark.parametrize("how", ["a link", "open to others", "a file", "nowhere"])
def test_a_folder_that_is_not_the_users_alone_is_not_used(tmp_path: Path, how: str, caplog: pytest.LogCaptureFixture):
    (parent := tmp_path / "parent").mkdir()
    unsafe(how, parent / "records", tmp_path / "elsewhere")
    records = CrashRecords(LEDGER, parent / "records")
    record = records.create("w", 1)
    slot = record.begin("a", 1)
    slot.set_working(False)
    assert not slot.at_work, "it is known in memory"
    assert "all its jobs are suspects" in caplog.text
    assert (records.ended(), records.waiting("w")) == ([], [])
    records.remove("w")
    record.end(slot)
    record.close()
    assert list((tmp_path / "elsewhere").iterdir()) == []


def test_a_folder_of_another_user_is_not_used(records: CrashRecords, monkeypatch: pytest.MonkeyPatch):
    records.create("w", 1)
    monkeypatch.setattr(crash_record.os, "getuid", lambda: os.geteuid() + 1)
    assert records.create("w", 1)._path is None


def test_a_link_in_place_of_a_record_is_not_followed(records: CrashRecords, tmp_path: Path):
    record = records.create("w", 1)
    record.begin("a", 1).set_working(False)
    path = record._path
    path.rename(tmp_path / "elsewhere")
    path.symlink_to(tmp_path / "elsewhere")
    assert records.waiting("w") == []


def test_the_folder_is_the_users_alone_by_default(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crash_record.tempfile, "tempdir", str(tmp_path))
    record = CrashRecords(LEDGER).create("w", 1)
    folder = tmp_path / f"rerankq-{os.getuid()}"
    assert record._path.parent == folder
    assert folder.stat().st_mode & 0o777 == 0o700
    assert record._path.stat().st_mode & 0o777 == 0o600
    assert LEDGER not in record._path.name


def test_a_full_disk_leaves_no_file_and_no_record(records: CrashRecords, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(crash_record.os, "write", lambda file, content: 0)
    assert records.create("w", 1)._path is None
    assert list(records._given.iterdir()) == []


def test_records_that_nobody_came_for_are_removed_after_a_day_unless_their_worker_lives(records: CrashRecords):
    paths = {}
    for name, ends, age_s in (("old", True, KEPT_S + 60), ("lives", False, KEPT_S + 60), ("young", True, KEPT_S - 60)):
        record = CrashRecords("redis://another/1", records._given).create(name, 1)
        record.begin("a", 1)
        paths[name] = record, record._path
        if ends:
            record.close()
        os.utime(record._path, (time.time() - age_s,) * 2)
    records.create("w", 1)
    assert [name for name, (_, path) in paths.items() if path.exists()] == ["lives", "young"]
