"""Fill a folder beside its place, one process at a time, and give it its name when all of it is on disk: `NewFolder`."""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path
from typing import Any, Mapping, Optional

from bnb_core.errors import InvalidArgumentError, StorageError

if sys.platform != "win32":
    import fcntl


class NewFolder:
    """A folder in the making; a context manager.

    The lock is the operating system's, and goes with the process that has it, however that ends.

    Args:
        place: where the folder is to be. It may be there if it is empty.

    Attributes:
        work: where its files are written until then. What a killed process left in it is still there.

    Raises:
        InvalidArgumentError: something is in the place already.
        StorageError: another process is making the same folder.
        OSError: the place is not writable.
    """

    def __init__(self, place: Path) -> None:
        self._place = place.resolve()
        self.work = self._place.with_name(f"{self._place.name}.partial")
        self._lock_path = self._place.with_name(f"{self._place.name}.lock")
        self._lock: Optional[int] = None

    def __enter__(self) -> "NewFolder":
        self._place.parent.mkdir(parents=True, exist_ok=True)
        while not self._try_to_lock():
            pass
        try:
            if self._place.exists() and (not self._place.is_dir() or any(self._place.iterdir())):
                raise InvalidArgumentError(f"{self._place} exists and is not an empty folder; choose another, or remove it")
            self.work.mkdir(exist_ok=True)
        except BaseException:
            self._unlock()
            raise
        return self

    def __exit__(self, *_: Any) -> None:
        if self.work.is_dir() and not any(self.work.iterdir()):
            self.work.rmdir()
        self._unlock()

    def clear(self) -> None:
        """Remove all that is in it."""
        shutil.rmtree(self.work, ignore_errors=not self.work.exists())
        self.work.mkdir()

    def write_json(self, name: str, value: Mapping[str, Any]) -> None:
        """Write a file, which is either the old one or the new one whenever the process ends."""
        part = self.work / f"{name}.part"
        with part.open("w", encoding="utf-8") as file:
            file.write(json.dumps(value, indent=2, default=str) + "\n")
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.work / name)

    def publish(self) -> None:
        """Put the folder in its place, complete."""
        for path in (*self.work.iterdir(), self.work):
            _sync(path)
        if self._place.exists():
            self._place.rmdir()
        self.work.replace(self._place)
        _sync(self._place.parent)

    def _try_to_lock(self) -> bool:
        """Lock; return False if the file that was locked is gone, with the process that had made it."""
        if sys.platform == "win32":
            return True  # there, files that another process has open cannot be replaced anyway
        lock = os.open(self._lock_path, os.O_RDWR | os.O_CREAT, 0o666)
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if not os.path.samestat(os.fstat(lock), self._lock_path.stat()):
                raise FileNotFoundError
        except BaseException as error:
            who = os.read(lock, 20).decode()
            os.close(lock)
            if isinstance(error, FileNotFoundError):
                return False
            if isinstance(error, BlockingIOError):
                raise StorageError(
                    f"{self._place} is being written by {who or 'another process'}; wait until it is done, or choose another folder"
                ) from None
            raise
        os.ftruncate(lock, 0)
        os.write(lock, f"process {os.getpid()}".encode())
        self._lock = lock
        return True

    def _unlock(self) -> None:
        if self._lock is not None:
            self._lock_path.unlink()  # before it is unlocked: whoever locks it then sees that it is gone
            os.close(self._lock)
            self._lock = None


def _sync(path: Path) -> None:
    """Have what was written to a file, or a folder's list of files, on disk."""
    if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
        return
    file = os.open(path, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)
