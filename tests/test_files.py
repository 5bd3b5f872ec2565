"""What is written whole is there whole, or what was there before stands."""

import errno
import os
import signal
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from minicpm_lite.files import locked, written_whole


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def write_folder(path: Path, text: str) -> None:
    with written_whole(path, folder=True) as beside:
        (beside / "inner").mkdir(parents=True)
        (beside / "inner" / "file").write_text(text)


def test_a_file_is_new_or_replaced(tmp_path):
    for text in ("one", "two"):
        with written_whole(tmp_path / "file") as beside:
            beside.write_text(text)
            assert names(tmp_path) != ["file"]
        assert (tmp_path / "file").read_text() == text
    assert names(tmp_path) == ["file"]


def test_a_folder_is_new_or_replaced(tmp_path):
    for text in ("one", "two"):
        write_folder(tmp_path / "folder", text)
        assert (tmp_path / "folder" / "inner" / "file").read_text() == text
    assert names(tmp_path) == ["folder"]


@pytest.mark.parametrize("error", [ValueError("no"), KeyboardInterrupt(), OSError(errno.ENOSPC, "full")])
def test_after_an_error_the_old_one_stands(tmp_path, error):
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "file").write_text("old")
    for name in ("file", "folder"):
        with pytest.raises(type(error)), written_whole(tmp_path / name, name == "folder") as beside:
            if name == "folder":
                beside.mkdir()
                beside /= "half"
            beside.write_text("half")
            raise error
    assert names(tmp_path) == ["file", "folder"]
    assert (tmp_path / "file").read_text() == "old"
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"


@pytest.mark.parametrize("folder", [False, True])
@pytest.mark.parametrize("linked", [False, True])
def test_a_file_takes_no_folder_s_place_and_a_folder_no_file_s(tmp_path, folder, linked):
    """Whoever names a folder means a place in it, and all that is in it would be gone."""
    write_folder(tmp_path / "folder", "three years of work")
    (tmp_path / "file").write_text("a day's work")
    place = tmp_path / ("file" if folder else "folder")
    if linked:
        place = tmp_path / "link"
        place.symlink_to("file" if folder else "folder")
    there, asked = ("a file", "a folder") if folder else ("a folder", "a file")
    with (
        pytest.raises(FileExistsError, match=f"{place} is {there}, which {asked} does not replace"),
        written_whole(place, folder),
    ):
        pytest.fail("nothing is written")
    assert (tmp_path / "file").read_text() == "a day's work"
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "three years of work"
    assert names(tmp_path) == ["file", "folder"] + ["link"] * linked


@pytest.mark.parametrize("folder", [False, True])
def test_what_a_link_leads_to_stays(tmp_path, folder):
    """A run's tokenizer.json may lead to that of the shards, which is not the run's to replace."""
    write = write_folder if folder else lambda path, text: path.write_text(text)
    write(tmp_path / "other's", "old")
    (tmp_path / "link").symlink_to("other's")
    with written_whole(tmp_path / "link", folder) as beside:
        write(beside, "new")
    inside = "inner/file" if folder else ""
    assert [(tmp_path / name / inside).read_text() for name in ("other's", "link")] == ["old", "new"]
    assert names(tmp_path) == ["link", "other's"]


def test_where_a_file_system_is_mounted_nothing_is_begun(tmp_path, monkeypatch):
    """The place could not take its new content at the end, when all was written."""
    (tmp_path / "disk").mkdir()
    monkeypatch.setattr(Path, "is_mount", lambda path: path.name == "disk")
    mounted = pytest.raises(FileExistsError, match="A file system is mounted at .*disk, which cannot be")
    with mounted, written_whole(tmp_path / "disk", folder=True):
        pytest.fail("nothing is written")
    write_folder(tmp_path / "disk" / "folder", "text")
    assert names(tmp_path) == ["disk"] and names(tmp_path / "disk") == ["folder"]


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK])
def test_a_file_system_without_locks_is_told_of_and_written(tmp_path, monkeypatch, code):
    def refuse(descriptor, how):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.warns(UserWarning, match=f"file system of {tmp_path} has no locks"), locked(tmp_path):
        write_folder(tmp_path / "folder", "text")


@pytest.mark.parametrize("code", [errno.EINVAL, errno.EIO])
def test_a_folder_that_its_file_system_does_not_sync_is_whole_all_the_same(tmp_path, monkeypatch, code):
    """But an error of the disk is one."""
    sync = os.fsync

    def refuse_folders(descriptor):
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(code, os.strerror(code))
        sync(descriptor)

    monkeypatch.setattr("os.fsync", refuse_folders)
    if code == errno.EIO:
        with pytest.raises(OSError, match="folder could not be written: Input/output error"):
            write_folder(tmp_path / "folder", "text")
    else:
        write_folder(tmp_path / "folder", "text")
        assert (tmp_path / "folder" / "inner" / "file").read_text() == "text"


def test_the_error_names_the_place_that_was_asked_for(tmp_path):
    with (
        pytest.raises(OSError, match=r"missing/file could not be written: No such file"),
        written_whole(tmp_path / "missing" / "file") as beside,
    ):
        beside.write_text("x")


def test_an_error_of_what_is_read_meanwhile_stays_as_it_is(tmp_path):
    with (
        pytest.raises(FileNotFoundError, match="source"),
        written_whole(tmp_path / "file") as beside,
    ):
        beside.write_text((tmp_path / "source").read_text())


def test_nothing_written_is_an_error(tmp_path):
    with pytest.raises(OSError, match="could not be written"), written_whole(tmp_path / "file"):
        pass


def test_a_folder_whose_replacement_was_killed_comes_back(tmp_path):
    write_folder(tmp_path / "folder", "old")
    (tmp_path / "folder").rename(tmp_path / ".folder.replaced")  # killed between the two renames
    with pytest.raises(ValueError), written_whole(tmp_path / "folder"):
        raise ValueError("the next attempt fails, too")
    assert (tmp_path / "folder" / "inner" / "file").read_text() == "old"
    assert names(tmp_path) == ["folder"]


def test_the_working_directory_is_not_replaced(tmp_path, monkeypatch):
    """The program, and the shell that started it, would stand in a folder that is gone."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "link").symlink_to(".")
    for path in (tmp_path, Path("."), tmp_path / "link"):
        with (
            pytest.raises(FileExistsError, match="is the working directory, which cannot be replaced"),
            written_whole(path, folder=True),
        ):
            raise AssertionError("it was begun")
    (tmp_path / "link").unlink()
    assert names(tmp_path) == [] == names(Path.cwd())
    with written_whole("shards", folder=True) as beside:
        beside.mkdir()
    assert names(tmp_path) == ["shards"]


KILLED = """
import os, signal, sys
from minicpm_lite.files import locked, written_whole
with written_whole(sys.argv[1]) as beside:
    beside.write_text("half")
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_taken_away_by_the_next(tmp_path):
    path = tmp_path / "file"
    path.write_text("old")
    killed = subprocess.run([sys.executable, "-c", KILLED, str(path)], env=os.environ)
    assert killed.returncode == -signal.SIGKILL
    assert path.read_text() == "old" and len(names(tmp_path)) == 2
    with written_whole(path) as beside:
        beside.write_text("new")
    assert path.read_text() == "new" and names(tmp_path) == ["file"]


def test_a_folder_is_locked_by_one_at_a_time(tmp_path):
    taken = pytest.raises(FileExistsError, match=f"{tmp_path} is being written by another program")
    with locked(tmp_path), taken, locked(tmp_path):
        raise AssertionError("locked twice")
    with locked(tmp_path):  # it is free again
        assert names(tmp_path) == []
    with pytest.raises(RuntimeError, match="mine"), locked(tmp_path):
        raise RuntimeError("mine")
    with locked(tmp_path):
        pass
    with pytest.raises(FileNotFoundError), locked(tmp_path / "nowhere"):
        pass


HOLD = """
import sys, time
from minicpm_lite.files import locked
with locked({folder!r}):
    print("locked", flush=True)
    time.sleep(60)
"""


def test_the_lock_of_a_killed_program_is_none(tmp_path):
    other = subprocess.Popen(
        [sys.executable, "-c", HOLD.format(folder=str(tmp_path))], stdout=subprocess.PIPE
    )
    other.stdout.readline()
    with pytest.raises(FileExistsError), locked(tmp_path):
        pass
    other.kill()
    other.wait()
    with locked(tmp_path):
        pass
    assert names(tmp_path) == []
