"""Files that are whole or not there: the library writes each of them beside its place, syncs it, renames it.

A reader, also one after a power cut, finds either the old file or the new one, never half of one.

A folder is another matter, because Python cannot exchange two: the old one must step aside before the new one
takes its name. In that moment a reader finds nothing under the name. If the power fails just then, the old
folder stands whole beside it, as ``.name.replaced``, until the next writer puts it back.

A folder that is written to for long, as a run's, is `locked` by one program at a time.
"""

import errno
import fcntl
import os
import shutil
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

__all__ = ["locked", "remove", "written_whole"]

# What file systems on a network or in user space say of what they do not have.
_HAS_NONE = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOLCK, errno.EINVAL)


@contextmanager
def written_whole(path: str | Path, folder: bool = False) -> Iterator[Path]:
    """A place beside ``path``, in which to write a file, or a folder; at the end it takes the name ``path``.

    What was there before stands until then and is replaced then; of a link, what it leads to stays, since
    others may read it. If anything is raised, also by a user who
    interrupts, what was begun is removed. What a killed process left beside is removed by the next one. One
    process writes a path at a time.

    Raises:
        FileExistsError: a folder has the name of the file, a file that of the folder, or a pipe or a device
            either's, or a file system is mounted there, or the program stands in that folder; such are never
            replaced.
        OSError: the folder above is missing or cannot be written, or the disk is full; nothing has changed.

    >>> import tempfile
    >>> path = Path(tempfile.mkdtemp()) / "greeting.txt"
    >>> with written_whole(path) as beside:
    ...     size = beside.write_text("hello")
    >>> path.read_text()
    'hello'
    """
    path = Path(path)
    if path.exists() and not (path.is_file() or path.is_dir()):
        raise FileExistsError(f"{path} is a pipe or a device, which is not replaced; give another name.")
    if path.exists() and path.is_dir() != folder:
        there, asked = ("a folder", "a file") if path.is_dir() else ("a file", "a folder")
        raise FileExistsError(f"{path} is {there}, which {asked} does not replace; give another name.")
    if path.is_dir() and path.samefile(os.curdir):  # whoever stands there would be in a folder that is gone
        raise FileExistsError(
            f"{path} is the working directory, which cannot be replaced; give the name of something in it."
        )
    if path.is_mount():
        raise FileExistsError(
            f"A file system is mounted at {path}, which cannot be replaced; give the name of something in it."
        )
    beside = path.with_name(f".{path.name}.writing")
    old = path.with_name(f".{path.name}.replaced")
    try:
        remove(beside)
        _put_back(old, path)
        try:
            yield beside
            _sync(beside)
            if path.is_dir():  # a folder can only take a name that is free
                path.rename(old)
            beside.replace(path)
            _sync_one(path.parent)
        except BaseException:
            remove(beside)
            raise
        finally:
            _put_back(old, path)
    except OSError as error:
        places = (str(beside), str(old))
        ours = error.filename is None or str(error.filename).startswith(places) or error.filename == str(path)
        if not ours:
            raise  # it comes from what the caller reads while writing
        raise OSError(error.errno, f"{path} could not be written: {error.strerror or error}") from None


@contextmanager
def locked(folder: str | Path) -> Iterator[None]:
    """Keep other programs that lock it, too, out of a folder, by a lock on the folder itself.

    The operating system takes the lock back when the program ends, however it ends.

    Warns:
        UserWarning: the folder's file system has no locks, so nobody is kept out.

    Raises:
        FileExistsError: another program holds it.
        OSError: there is no such folder.
    """
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise FileExistsError(
                f"{folder} is being written by another program. Wait for its end, or choose another folder."
            ) from None
        except OSError as error:
            if error.errno not in _HAS_NONE:
                raise
            warnings.warn(
                f"The file system of {folder} has no locks ({error.strerror}), so nothing keeps another "
                "program from writing there, too. Start none.",
                stacklevel=3,
            )
        yield
    finally:
        os.close(descriptor)


def _put_back(old: Path, path: Path) -> None:
    """Give a replaced folder its name again if nothing has taken it, else remove it."""
    if old.exists() and not path.exists():
        old.rename(path)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a folder with all that is in it, or a link, of which what it points to stays."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    """Make sure that a file, or every file of a folder and the folder itself, is on the disk."""
    if path.is_dir():
        for inside in path.iterdir():
            _sync(inside)
    _sync_one(path)


def _sync_one(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if not (path.is_dir() and error.errno in _HAS_NONE):  # some file systems sync files alone
            raise
    finally:
        os.close(descriptor)
