"""Records on disk: what holds after a death at any moment, byte by byte."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from migrate.record import FOLDER, Record, RecordBook
from proto.states import Role

ID = "0" * 31 + "1"


def fresh(**changes: object) -> Record:
    first = Record(
        role=Role.SOURCE, migration_id=ID, guest_id="g", files=[(1, 2)], peer="p:1", token="ab" * 16, epoch=0, streams=1
    )
    return first.changed(**changes) if changes else first


def book(runtime_dir: Path) -> RecordBook:
    made = RecordBook(runtime_dir)
    made.open()
    return made


def staged(runtime_dir: Path) -> RecordBook:
    """Of a daemon just before the act that is recorded."""
    records = book(runtime_dir)
    records.write(fresh())
    records.stage(fresh(may_run_there=True))
    return records


def committed(runtime_dir: Path) -> RecordBook:
    """And just after it has been recorded."""
    records = staged(runtime_dir)
    records.commit(ID)
    return records


def next_life(runtime_dir: Path) -> Record | None:
    """What the next daemon finds; and the one after it, which must not find another."""
    found = book(runtime_dir).earlier.get(ID)
    assert book(runtime_dir).earlier.get(ID) == found
    left = {path.name for path in (runtime_dir / FOLDER).iterdir()}
    assert left == (set() if found is None else {f"{ID}.json"})
    return found


def test_what_is_only_staged_has_not_happened(tmp_path: Path) -> None:
    staged(tmp_path)
    assert next_life(tmp_path) == fresh()


def test_what_is_committed_holds(tmp_path: Path) -> None:
    committed(tmp_path)
    assert next_life(tmp_path) == fresh(may_run_there=True)


def test_what_is_written_later_holds(tmp_path: Path) -> None:
    """Also when the daemon died with the staged one still there."""
    records = book(tmp_path)
    records.write(fresh())
    records.stage(once := fresh(may_run_there=True))
    records.commit(ID)
    shutil.copy(tmp_path / FOLDER / f"{ID}.staged", tmp_path / "kept")
    records.write(again := once.changed(may_run_there=False))
    assert not (tmp_path / FOLDER / f"{ID}.staged").exists()
    shutil.copy(tmp_path / "kept", tmp_path / FOLDER / f"{ID}.staged")
    assert next_life(tmp_path) == again


def test_removed(tmp_path: Path) -> None:
    records = committed(tmp_path)
    records.remove(ID)
    assert next_life(tmp_path) is None
    records.remove(ID)


def test_no_descriptor_is_left(tmp_path: Path) -> None:
    def open_files() -> int:
        return len(os.listdir("/proc/self/fd"))

    records = book(tmp_path)
    before = open_files()
    for end in (records.remove, records.commit):
        records.write(fresh())
        records.stage(fresh(may_run_there=True))
        end(ID)
        assert open_files() == before


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda data: data[:-1], "EOF while parsing"),
        (lambda data: b"", "EOF while parsing"),
        (lambda data: b"\xff" + data, "expected value"),
        (lambda data: data.replace(b'"version":2', b'"version":9'), "version: Input should be 1 or 2"),
    ],
    ids=["cut", "empty", "no text", "of a later version"],
)
def test_one_that_cannot_be_read_is_left_as_it_is(
    tmp_path: Path, spoil: Callable[[bytes], bytes], why: str, capfd: pytest.CaptureFixture[str]
) -> None:
    records = book(tmp_path)
    records.write(fresh())
    path = tmp_path / FOLDER / f"{ID}.json"
    path.write_bytes(spoil(path.read_bytes()))
    kept = path.read_bytes()
    assert book(tmp_path).earlier == {}
    assert path.read_bytes() == kept
    told = capfd.readouterr().out
    assert str(path) in told
    assert why in told
    assert "ab" * 16 not in told


def test_a_directory_among_them_is_left_as_it_is(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    (tmp_path / FOLDER / f"{ID}.json").mkdir(parents=True)
    found = book(tmp_path)
    assert found.earlier == {}
    assert [path.name for path in found.unreadable] == [f"{ID}.json"]
    assert "Is a directory" in capfd.readouterr().out


def test_beside_one_that_cannot_be_read_nothing_is_believed(tmp_path: Path) -> None:
    """What was committed and is damaged said more than the older one does."""
    committed(tmp_path)
    path = tmp_path / FOLDER / f"{ID}.staged"
    path.write_bytes(path.read_bytes()[:-1])
    for _ in range(2):
        assert book(tmp_path).earlier == {}
    assert path.with_suffix(".taken").exists()


def test_what_another_daemon_has_taken_is_committed_no_more(tmp_path: Path) -> None:
    """It may have read that nothing had happened: so nothing must happen."""
    records = staged(tmp_path)
    assert book(tmp_path).earlier == {ID: fresh()}
    with pytest.raises(OSError, match="No such file"):
        records.commit(ID)
    assert next_life(tmp_path) == fresh()


def test_a_death_while_records_are_taken_over(tmp_path: Path) -> None:
    """Between any two steps: what was committed holds."""
    committed(tmp_path)
    path = tmp_path / FOLDER / f"{ID}.staged"
    path.rename(path.with_suffix(".taken"))
    kept = path.with_suffix(".taken").read_bytes()
    assert next_life(tmp_path) == fresh(may_run_there=True)
    path.with_suffix(".taken").write_bytes(kept)
    assert next_life(tmp_path) == fresh(may_run_there=True)


def test_a_full_disk_is_an_error_before_the_act(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    records = book(tmp_path)
    records.write(fresh())
    write = os.write
    monkeypatch.setattr(os, "write", lambda descriptor, data: write(descriptor, data[:100]))
    with pytest.raises(OSError, match="No space left"):
        records.stage(fresh(may_run_there=True))
    monkeypatch.undo()
    assert next_life(tmp_path) == fresh()
