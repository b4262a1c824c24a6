"""The journal of a batch: what was answered stays, whatever happened to whoever wrote it."""

import pytest

from rerankq.batches.journal import Journal, JournalInUse, JournalOfAnother

HEADER = b"batch_1"


@pytest.fixture
def path(tmp_path):
    """A journal with answers to lines 3, 1 and 2."""
    path = tmp_path / "journal"
    with Journal.open(path, HEADER) as journal:
        journal.append(3, "output", b'{"n": 3}')
        journal.append(1, "error", b'{"n": 1}')
        journal.append(2, "output", b'{"n": 2}')
    return path


def test_answers_come_in_the_order_of_the_input_by_their_kind(path):
    with Journal.open(path, HEADER) as journal:
        assert list(journal.answers("output")) == [b'{"n": 2}\n', b'{"n": 3}\n']
        assert list(journal.answers("error")) == [b'{"n": 1}\n']
        assert list(journal.answers("output", "error")) == [b'{"n": 1}\n', b'{"n": 2}\n', b'{"n": 3}\n']
        assert journal.counts == {"output": 2, "error": 1}
        assert [number in journal for number in (0, 1, 2, 3, 4, 99)] == [False, True, True, True, False, False]


@pytest.mark.parametrize(
    "torn", [b"o", b"o4 ", b'o4 {"n": 4}', b'o4 {"n"\n', b"\0" * 64, b"x4 {}\n", b"o2 {}\n", b"o-4 {}\n"]
)
def test_what_was_not_written_whole_is_cut_off(path, torn):
    with path.open("ab") as file:
        file.write(torn)
    with Journal.open(path, HEADER) as journal:
        assert len(journal) == 3
        journal.append(4, "output", b'{"n": 4}')
    with Journal.open(path, HEADER) as journal:
        assert list(journal.answers("output"))[-1] == b'{"n": 4}\n'


def test_a_line_is_answered_once(path):
    with Journal.open(path, HEADER) as journal:
        with pytest.raises(ValueError, match="answered already"):
            journal.append(2, "error", b"{}")
        assert len(journal) == 3


def test_only_one_writes_it_at_a_time(path):
    with Journal.open(path, HEADER), pytest.raises(JournalInUse):
        Journal.open(path, HEADER)
    Journal.open(path, HEADER).close()


def test_the_journal_of_other_work_is_left_alone_unless_told_to_start_again(path):
    before = path.read_bytes()
    with pytest.raises(JournalOfAnother):
        Journal.open(path, b"batch_2")
    assert path.read_bytes() == before
    with Journal.open(path, b"batch_2", restart=True) as journal:
        assert len(journal) == 0
