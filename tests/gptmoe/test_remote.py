"""Inputs behind URIs: fetched once, whole or not at all; and each message."""

import logging
import os
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest

from gptmoe.checkpoint import fetch_checkpoint, latest_uri
from gptmoe.config import Uri
from gptmoe.errors import CheckpointError, DataError
from gptmoe.remote import check, fetch, look
from tests.bucket import Bucket, serving

POEM = "春眠不觉晓，处处闻啼鸟。"


@pytest.fixture
def there(tmp_path: Path) -> Path:
    """A folder to be reached by URI."""
    folder = tmp_path / "there" / "poems"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_text(POEM, encoding="utf-8")
    (folder / "more" / "b.txt").write_text(POEM * 2, encoding="utf-8")
    return folder


@pytest.fixture
def bucket(there: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Bucket]:
    """The same behind S3's protocol."""
    with serving(there.parent, monkeypatch) as bucket:
        yield bucket


def contents(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): path.read_text("utf-8") for path in files}


def test_a_file_is_fetched_once(
    there: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    uri, inputs = Uri(f"file://{there}/a.txt"), tmp_path / "run" / "inputs"
    with caplog.at_level(logging.INFO, "gptmoe.remote"):
        copy = fetch(uri, inputs)
        first = [record.getMessage() for record in caplog.records]
        assert fetch(uri, inputs) == copy
    assert [record.getMessage() for record in caplog.records] == first
    assert first[0] == f"fetching {uri}: 1 files, 0.0 MB"
    assert first[1].startswith(f"fetched {uri} to {copy.parent} in ")
    assert (copy.name, copy.read_text("utf-8")) == ("a.txt", POEM)
    assert copy.parent.parent == inputs
    assert copy.parent.name.startswith("a.txt-")


def test_a_folder_keeps_its_names(there: Path, tmp_path: Path) -> None:
    copy = fetch(Uri(f"file://{there}/"), tmp_path)
    assert copy.name == "poems"
    assert contents(copy) == {"a.txt": POEM, "more/b.txt": POEM * 2}


def test_what_has_changed_is_fetched_beside_what_was_there(there: Path, tmp_path: Path) -> None:
    uri = Uri(f"file://{there}")
    before = fetch(uri, tmp_path)
    os.utime(there / "a.txt", (1, 1))
    after = fetch(uri, tmp_path)
    assert before != after
    assert contents(before) == contents(after)


def test_files_and_folders_of_an_object_store(bucket: Bucket, tmp_path: Path) -> None:
    file, folder = Uri(bucket.uri("poems/more/b.txt")), Uri(bucket.uri("poems"))
    check(file)
    check(folder)
    assert bucket.read == []
    assert look(folder).num_bytes == 3 * len(POEM.encode())
    assert fetch(file, tmp_path / "in").read_text("utf-8") == POEM * 2
    copy = fetch(folder, tmp_path / "in")
    assert contents(copy) == {"a.txt": POEM, "more/b.txt": POEM * 2}
    read = list(bucket.read)
    assert fetch(folder, tmp_path / "in") == copy
    assert bucket.read == read


def test_a_copy_that_fails_leaves_nothing(bucket: Bucket, tmp_path: Path) -> None:
    uri, inputs = Uri(bucket.uri("poems")), tmp_path / "in"
    bucket.lost.add("poems/more/b.txt")
    with pytest.raises(DataError) as raised:
        fetch(uri, inputs)
    message = str(raised.value)
    assert message.startswith(f"{uri} cannot be fetched to {inputs}: ")
    assert message.endswith("; start again to try again")
    assert "\n" not in message
    assert contents(inputs) == {".lock": ""}
    bucket.lost.clear()
    assert len(contents(fetch(uri, inputs))) == 2


@pytest.mark.parametrize("name", ["../../../evil.txt", "more/../../evil.txt"])
def test_a_name_that_leads_out_of_the_folder_is_refused(
    bucket: Bucket, tmp_path: Path, name: str
) -> None:
    bucket.also[f"poems/{name}"] = bucket.folder / "poems" / "a.txt"
    before, uri = contents(tmp_path), Uri(bucket.uri("poems"))
    with pytest.raises(DataError) as raised:
        fetch(uri, tmp_path / "run" / "inputs")
    assert str(raised.value) == (
        f"{uri} holds {name}, and a name may not have `..` in it; rename it"
    )
    assert contents(tmp_path) == before


def test_a_uri_that_ends_with_the_folder_above_is_refused(there: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"more/\.\. holds \.\., and a name may not have"):
        fetch(Uri(f"file://{there}/more/.."), tmp_path / "in")


def test_what_a_killed_process_left_is_no_copy(there: Path, tmp_path: Path) -> None:
    uri = Uri(f"file://{there}")
    copy = fetch(uri, tmp_path)
    part = copy.parent.rename(copy.parent.with_name(copy.parent.name + ".tmp"))
    (part / "poems" / "a.txt").write_text("春")
    assert contents(fetch(uri, tmp_path))["a.txt"] == POEM
    assert not part.exists()


def test_processes_that_start_together_fetch_once(bucket: Bucket, tmp_path: Path) -> None:
    uri = Uri(bucket.uri("poems"))
    threads = [threading.Thread(target=fetch, args=(uri, tmp_path / "in")) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(bucket.read) == ["poems/a.txt", "poems/more/b.txt"]


def test_nothing_there_nobody_there(there: Path, tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"mock:///x.txt does not exist; check the address"):
        check(Uri("mock:///x.txt"))
    with pytest.raises(
        DataError, match=r"nosuch://a/b cannot be reached: Unrecognized .*; check the address, and"
    ):
        check(Uri("nosuch://a/b"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match=r"empty holds no file; name a file, or a folder with"):
        look(Uri(f"file://{tmp_path}/empty"))
    (tmp_path / "file").write_text("")
    with pytest.raises(DataError, match=r"cannot be fetched to .*file: .*File exists"):
        fetch(Uri(f"file://{there}"), tmp_path / "file")


def test_the_newest_checkpoint_is_chosen_where_it_lies(bucket: Bucket, tmp_path: Path) -> None:
    for step in (2, 10, 11):
        folder = bucket.folder / "run" / "checkpoints" / f"step-{step:08d}"
        folder.mkdir(parents=True)
        (folder / "weights").write_text(str(step))
        if step < 11:  # the last one is not complete
            (folder / "manifest.json").write_text("{}")
    newest = Uri(bucket.uri("run/checkpoints/step-00000010"))
    for name in ("run", "run/", "run/checkpoints", "run/checkpoints/step-00000010"):
        assert latest_uri(Uri(bucket.uri(name))) == newest
    copy = fetch_checkpoint(Uri(bucket.uri("run")), tmp_path / "in")
    assert contents(copy) == {"manifest.json": "{}", "weights": "10"}
    assert not any("step-00000002" in name for name in bucket.read)
    with pytest.raises(CheckpointError, match=r"holds no complete checkpoint; name a checkpoint,"):
        latest_uri(Uri(bucket.uri("poems")))
