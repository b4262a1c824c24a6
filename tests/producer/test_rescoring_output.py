import math
import os
import resource
import stat
import struct
import threading
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rerankq.rescoring import output
from rerankq.rescoring.inputs import InputFault
from rerankq.rescoring.output import WriteFailed

LINES = ["q1 Q0 d1 1 0.5 rerankq\n", "q1 Q0 d2 2 0.4 rerankq\n"]
WRITTEN = "".join(LINES)


def write(goal, lines=LINES):
    message = []
    with goal.opened(message.append) as write:
        write(lines)
    return message


@pytest.fixture
def inputs(tmp_path):
    """The input files of a re-scoring, by their options."""
    names = {"queries": "q", "corpus": "c", "run": "r"}
    for name in names.values():
        (tmp_path / name).write_text(name)
    return {**{option: str(tmp_path / name) for option, name in names.items()}, "qrels": None}


@pytest.fixture
def resolve(inputs, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return lambda name: output.resolve(str(name), inputs)


def test_new_file_appears_whole_with_its_journal_beside_it_until_then(resolve, tmp_path):
    goal = resolve("out.trec")
    assert (goal.exists, goal.is_stdout) == (False, False)
    assert goal.journal("work") == tmp_path / "out.trec.part"

    def lines():
        yield LINES[0]
        assert not (tmp_path / "out.trec").exists()
        yield LINES[1]

    write(goal, lines())
    assert (tmp_path / "out.trec").read_text() == WRITTEN
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out.trec", "q", "r"]


def test_replaced_file_keeps_its_mode(resolve, tmp_path):
    (tmp_path / "out.trec").write_text("before")
    (tmp_path / "out.trec").chmod(0o640)
    goal = resolve("out.trec")
    assert goal.exists
    write(goal)
    assert (tmp_path / "out.trec").read_text() == WRITTEN
    assert stat.S_IMODE((tmp_path / "out.trec").stat().st_mode) == 0o640


def test_symbolic_link_stays_and_its_target_is_written(resolve, tmp_path):
    (tmp_path / "folder").mkdir()
    (tmp_path / "first").symlink_to("second")
    (tmp_path / "second").symlink_to("folder/out.trec")
    goal = resolve("first")
    assert (goal.exists, goal.journal("")) == (False, tmp_path / "folder" / "out.trec.part")
    write(goal)
    assert (tmp_path / "first").is_symlink()
    assert (tmp_path / "folder" / "out.trec").read_text() == WRITTEN
    assert resolve("first").exists


def test_hard_links_all_have_the_run(resolve, tmp_path):
    (tmp_path / "out.trec").write_text("x" * 1000)
    (tmp_path / "other").hardlink_to(tmp_path / "out.trec")
    write(resolve("out.trec"))
    assert (tmp_path / "other").read_text() == WRITTEN


def test_device_is_written_and_stays_a_device(resolve):
    goal = resolve("/dev/null")
    assert (goal.exists, goal.stream) == (False, True)
    write(goal)
    assert stat.S_ISCHR(Path("/dev/null").stat().st_mode)


def test_named_pipe_is_opened_before_the_work_and_written(resolve, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append((tmp_path / "pipe").read_text()))
    reader.start()
    message = write(resolve("pipe"))
    reader.join()
    assert read == [WRITTEN]
    assert message == ["pipe: waiting for a reader"]
    assert stat.S_ISFIFO((tmp_path / "pipe").stat().st_mode)


@contextmanager
def as_stdout(descriptor):
    """Make another open file our standard output. In the test itself: pytest's capture has it between the phases."""
    kept = os.dup(1)
    os.dup2(descriptor, 1)
    try:
        yield
    finally:
        os.dup2(kept, 1)
        os.close(kept)


@pytest.fixture
def pipe():
    with ExitStack() as stack:
        yield [
            stack.enter_context(os.fdopen(end, mode, buffering=0))
            for end, mode in zip(os.pipe(), ("rb", "wb"), strict=True)
        ]


@pytest.mark.parametrize("name", ["-", "/dev/stdout", "/dev/fd/1", "/proc/self/fd/1", "link"])
def test_standard_output_has_many_names(resolve, tmp_path, pipe, name):
    (tmp_path / "link").symlink_to("/dev/stdout")
    reading, writing = pipe
    with as_stdout(writing.fileno()):
        goal = resolve(name)
        write(goal)
        os.fstat(1)  # open still
    assert goal.is_stdout
    assert reading.read(1000).decode() == WRITTEN
    assert not (tmp_path / "-").exists()


def test_file_that_is_already_standard_output_is_standard_output(resolve, tmp_path):
    with (tmp_path / "out.trec").open("w") as file:
        file.write("before\n")
        file.flush()
        with as_stdout(file.fileno()):
            goal = resolve("out.trec")
            write(goal)
    assert goal.is_stdout
    assert (tmp_path / "out.trec").read_text() == "before\n" + WRITTEN


def test_journal_of_a_stream_is_in_a_private_folder(resolve, tmp_path, monkeypatch):
    monkeypatch.setattr(output.tempfile, "tempdir", str(tmp_path))
    journal = resolve("/dev/null").journal("some-work")
    assert journal == tmp_path / f"rerankq-{os.getuid()}" / "some-work.part"
    assert stat.S_IMODE(journal.parent.stat().st_mode) == 0o700
    assert resolve("/dev/null").journal("some-work") == journal
    journal.parent.rmdir()
    journal.parent.symlink_to(tmp_path)
    with pytest.raises(InputFault, match="is not a folder that belongs to this user"):
        resolve("/dev/null").journal("some-work")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("folder", r"--output: folder is a folder"),
        ("folder-link", r"--output: folder-link is a folder"),
        ("new/", r"--output: new/ is a folder"),
        ("", r"--output: . is a folder"),
        ("nowhere/out.trec", r"--output: nowhere is not a folder"),
        ("q/out.trec", r"--output: (q is not a folder|q/out.trec cannot be written: Not a directory)"),
        ("loop", r"--output: loop cannot be written: Too many levels"),
        ("nowhere-link", r"--output: .*nowhere is not a folder"),
        ("x" * 300, r"--output: x+ cannot be written: File name too long"),
        ("/dev/fd/987", r"--output: /dev/fd/987 is not open for writing"),
        ("r", r"--output: r is the same file as --run"),
        ("./folder/../r", r"is the same file as --run"),
        ("run-link", r"is the same file as --run"),
        ("corpus-twin", r"is the same file as --corpus"),
        ("x", r"x.part, the journal, is the same file as --queries"),
        ("y", r"y.part, the journal, is not a regular file"),
    ],
)
def test_impossible_output_is_refused_before_anything_starts(resolve, tmp_path, name, message):
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder-link").symlink_to("folder")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "nowhere-link").symlink_to("nowhere/out.trec")
    (tmp_path / "run-link").symlink_to("r")
    (tmp_path / "corpus-twin").hardlink_to(tmp_path / "c")
    (tmp_path / "x.part").symlink_to("q")
    os.mkfifo(tmp_path / "y.part")
    with pytest.raises(InputFault, match=message):
        resolve(name)
    assert (tmp_path / "r").read_text() == "r"


def test_standard_output_that_is_an_input_is_refused(resolve, tmp_path):
    with (
        (tmp_path / "r").open("a") as file,
        as_stdout(file.fileno()),
        pytest.raises(InputFault, match="--output: - is the same file as --run"),
    ):
        resolve("-")


@pytest.mark.parametrize(("denied", "message"), [("out.trec", "out.trec is not writable"), (".", ". is not writable")])
def test_unwritable_output_is_refused_before_anything_starts(resolve, tmp_path, monkeypatch, denied, message):
    # As root, who runs these tests in a container, everything may be written.
    (tmp_path / "out.trec").write_text("before")
    monkeypatch.setattr(os, "access", lambda path, mode: Path(path).resolve() != (tmp_path / denied).resolve())
    with pytest.raises(InputFault, match=f"--output: {message}"):
        resolve("out.trec")


def test_full_device_is_reported_once(resolve):
    with pytest.raises(WriteFailed, match="/dev/full: cannot be written: No space left on device"):
        write(resolve("/dev/full"))


def test_full_disk_leaves_the_old_file_and_no_temporary_one(resolve, tmp_path):
    (tmp_path / "out.trec").write_text("before")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20, hard))
    try:
        with pytest.raises(WriteFailed, match=r"out.trec: cannot be written: File too large"):
            write(resolve("out.trec"))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert (tmp_path / "out.trec").read_text() == "before"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["c", "out.trec", "q", "r"]


def test_reader_that_closes_standard_output_is_no_failure(resolve, pipe):
    reading, writing = pipe
    reading.close()
    with as_stdout(writing.fileno()), pytest.raises(BrokenPipeError):
        write(resolve("-"))


def test_stream_that_is_not_open_for_writing_is_reported(resolve, pipe):
    reading, writing = pipe
    assert resolve(f"/dev/fd/{writing.fileno()}").stream
    with pytest.raises(InputFault, match="is not open for writing"):
        resolve(f"/dev/fd/{reading.fileno()}")


def single(number):
    return struct.unpack("<f", struct.pack("<f", number))[0]


def reread(lines, *, later_names_first, precision):
    """As a reader does who sorts by score, and by name where scores are equal."""
    rows = [line.split() for line in lines]
    rows.sort(key=lambda row: row[2], reverse=later_names_first)
    return [row[2] for row in sorted(rows, key=lambda row: precision(float(row[4])), reverse=True)]


ANY = st.floats(allow_nan=True, allow_infinity=True)
TIED = st.sampled_from([0.0, -0.0, 0.5, 0.5 + 1e-12, 1e-300, 1e-45, 3.5e38, -3.5e38, 0.1, 0.1 + 1e-9])


@given(st.lists(st.one_of(TIED, ANY), max_size=40))
def test_written_scores_give_every_reader_the_written_order(scores):
    scores = sorted(scores, key=lambda score: -float("inf") if score != score else score, reverse=True)
    names = [f"{at * 37 % 41}" for at in range(len(scores))]
    lines = list(output.run_lines("q", list(zip(names, scores, strict=True))))
    for precision in (float, single):
        for later_names_first in (False, True):
            assert reread(lines, later_names_first=later_names_first, precision=precision) == names
    written = [float(line.split()[4]) for line in lines]
    assert all(math.isfinite(single(number)) for number in written)


@given(st.lists(st.floats(-1e6, 1e6, width=32), unique=True, max_size=40))
def test_distinct_scores_are_written_as_they_are(scores):
    scores = sorted({score + 0.0 for score in scores if score == 0 or abs(score) > 1e-37}, reverse=True)
    assert [float(written) for written in output.descending(scores)] == scores


@given(st.lists(st.sampled_from([0.25, 0.5, 0.75]), max_size=200))
def test_written_scores_are_close_to_the_true_ones(scores):
    scores.sort(reverse=True)
    assert [float(written) for written in output.descending(scores)] == pytest.approx(scores, abs=2e-5)


def test_run_is_synced_to_disk_before_it_replaces_the_old_file(resolve, tmp_path, monkeypatch):
    (tmp_path / "out.trec").write_text("before")
    synced = []
    monkeypatch.setattr(os, "fsync", lambda number: synced.append((os.fstat(number).st_size, read())))

    def read():
        return (tmp_path / "out.trec").read_text()

    write(resolve("out.trec"))
    assert synced == [(len(WRITTEN), "before")]
    assert read() == WRITTEN


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives files away")
def test_replaced_file_keeps_its_owner(resolve, tmp_path):
    (tmp_path / "out.trec").write_text("before")
    os.chown(tmp_path / "out.trec", 12345, 23456)
    write(resolve("out.trec"))
    found = (tmp_path / "out.trec").stat()
    assert (found.st_uid, found.st_gid) == (12345, 23456)


@pytest.mark.skipif(os.getuid() != 0, reason="only root gives folders away")
def test_private_folder_of_another_user_is_refused(resolve, tmp_path, monkeypatch):
    monkeypatch.setattr(output.tempfile, "tempdir", str(tmp_path))
    (tmp_path / f"rerankq-{os.getuid()}").mkdir()
    os.chown(tmp_path / f"rerankq-{os.getuid()}", 12345, 23456)
    with pytest.raises(InputFault, match="is not a folder that belongs to this user"):
        resolve("/dev/null").journal("some-work")
