"""Files on the disk: pages of them, and their time."""

import time

import pytest

from rerankq.gateway.file_store import FileStore, FileUnknown, new_id


def written(store: FileStore, *, expires_at: int | None = None, owner: str | None = "one") -> str:
    parts = {"filename": "in.jsonl", "purpose": "batch", "owner": owner, "expires_at": expires_at}
    return store.write(new_id("file-"), [b"content"], **parts).id


def test_pages_hold_every_file_once_whatever_was_deleted_meanwhile(tmp_path):
    store = FileStore(tmp_path)
    names = [written(store) for _ in range(5)]
    written(store, owner="two")
    for oldest_first, ordered in ((False, names[::-1]), (True, names)):
        first, more = store.page("one", limit=2, oldest_first=oldest_first)
        assert ([one.id for one in first], more) == (ordered[:2], True)
        rest, more = store.page("one", after=ordered[1], limit=3, oldest_first=oldest_first)
        assert ([one.id for one in rest], more) == (ordered[2:], False)
    store.delete(names[3], "one")
    assert [one.id for one in store.page("one", after=names[3], limit=9)[0]] == names[2::-1]


def test_a_file_whose_time_is_over_is_unknown_and_then_removed(tmp_path):
    store = FileStore(tmp_path)
    gone, stays = written(store, expires_at=int(time.time()) - 1), written(store, expires_at=int(time.time()) + 60)
    with pytest.raises(FileUnknown):
        store.read(gone, "one")
    with pytest.raises(FileUnknown):
        store.content(gone, "one")
    assert [one.id for one in store.page("one", limit=9)[0]] == [stays]
    store.remove_old(older_than_s=3600)
    assert [path.name for path in (tmp_path / "files").iterdir()] == [stays]
