"""``--remote-sync``: a copy of the run's folder at a URL that fsspec can write to, such as s3:// or gs://."""

import contextlib
import functools
import logging
import os
import shutil
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..checkpoints.background import join
from ..checkpoints.checkpoint import CheckpointError
from ..checkpoints.of_run import LATEST, STEP, Checkpoints, read_saved
from ..checkpoints.sharded import MANIFEST
from ..io.files import replace_file, write_folder
from ..io.units import BYTES, scaled
from ..runs.folder import RunFolder
from ..runs.lock import LOCK_NAME, locked

log = logging.getLogger("clipfast")
ATTEMPTS, FIRST_WAIT = 3, 1.0  # attempts to upload a file; seconds before the second attempt, doubled for each further
LAST_UPLOAD = 600.0  # a finished run waits at most this many seconds for its last upload
# On these file systems a file is uploaded under a temporary name and then renamed, since readers could see a half
# uploaded file. Object stores such as S3 show a file only when it is complete.
RENAMING = {"file", "local", "sftp", "ssh", "smb", "hdfs", "arrow_hdfs", "webhdfs"}
# A resumed run appends to these files of its folder, so they are downloaded with a checkpoint.
RECORDS = ("config.json", "metrics.jsonl", "skipped.tsv", "out.log")

Version = tuple[int, int, int]  # inode, modification time and size, which tell whether a file has changed


class RemoteCopy:
    """The remote copy of a run's folder: a folder of the same name under ``url``, to which new files are uploaded.

    While it is open as a context manager, a thread of its own uploads after each checkpoint, but not more often than
    every ``frequency`` seconds, and at the end. Failures are logged and never end a run.

    Raises:
        ValueError: fsspec does not know the URL, or cannot reach it.
        ImportError: the package for this kind of URL is missing.
    """

    def __init__(self, folder: RunFolder, url: str, frequency: float = 300.0) -> None:
        from fsspec.core import url_to_fs

        self.folder, self.frequency = folder, frequency
        self.url = f"{url.rstrip('/')}/{folder.path.name}"
        try:
            self._fs, root = url_to_fs(url)
            self._root = f"{root.rstrip('/')}/{folder.path.name}"
            self._steps()
        except ImportError:
            raise
        except Exception as error:
            raise ValueError(f"--remote-sync {url} cannot be used: {error}") from error
        protocols = self._fs.protocol
        self._is_renaming = not RENAMING.isdisjoint([protocols] if isinstance(protocols, str) else protocols)
        self._sent: dict[str, Version] = {}
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, name="clipfast remote sync", daemon=True)

    def __enter__(self) -> "RemoteCopy":
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is not None and not issubclass(kind, Exception):
            return  # after KeyboardInterrupt (a second Ctrl-C), the user does not want to wait for an upload
        self._stop.set()
        self._wake.set()
        join(self._thread, LAST_UPLOAD)
        if self._thread.is_alive():
            log.error(f"--remote-sync: the last upload to {self.url} took over {LAST_UPLOAD:.0f} s, and is given up")

    def notify(self) -> None:
        """Tell the uploading thread that the run has new files."""
        self._wake.set()

    def refuse_other_run(self, step: int | None) -> None:
        """Check that the remote copy does not hold another run.

        Raises:
            ValueError: it has a checkpoint that is newer than ``step``, from which this run resumes, or has any
                checkpoint although this run is new (``step`` is None).
        """
        newest = max(self._steps(), default=None)
        if newest is not None and (step is None or newest > step):
            raise ValueError(
                f"{self.url} holds a checkpoint of step {newest}: go on from it with --resume latest and the run's "
                "--name, or choose another --name or --remote-sync"
            )

    def restore(self) -> list[str]:
        """Download the newest complete remote checkpoint and the run's records, unless a local checkpoint is as new.

        If a downloaded checkpoint is damaged, the next older one is tried.

        Returns:
            One line for each checkpoint that was downloaded or found damaged.

        Raises:
            ValueError: another process writes to the folder.
        """
        with locked(self.folder.path):
            newest = -1
            with contextlib.suppress(CheckpointError):
                newest = _step_of(Checkpoints(self.folder.checkpoints).newest_whole().content)
            found: list[str] = []
            for step, remote in sorted(self._steps().items(), reverse=True):
                if step <= newest:
                    break
                wrong = self._download(step, remote)
                found.append(wrong or f"Step {step} was downloaded from {self.url}")
                if wrong is None:
                    break
            return found

    def sync(self) -> None:
        """Upload new files: checkpoints, records, then ``epoch_latest.pt``. Then remove old remote checkpoints.

        Raises:
            Exception: any error of the file system that stops the upload.
        """
        if not self.folder.is_held():
            return  # the run's folder was removed or renamed, and files at its path may belong to another run
        sent = 0
        for name, path in self._local_files():
            try:
                sent += self._send(name, path)
            except FileNotFoundError:
                if path.exists():  # otherwise training has just removed an old checkpoint
                    raise
        kept = Checkpoints(self.folder.checkpoints).steps()
        there = {path.name for path in kept.values()}
        for remote in self._checkpoints():
            if there and remote.rpartition("/")[2] not in there:
                self._fs.rm(remote, recursive=True)
        if sent:
            log.info(f"Uploaded {scaled(sent, BYTES)} to {self.url}")

    def _run(self) -> None:
        """Upload whenever :meth:`notify` was called, until the run ends; this is the uploading thread."""
        is_last = False
        while not is_last:
            self._wake.wait()
            self._wake.clear()
            is_last = self._stop.is_set()
            try:
                self.sync()
            except Exception as error:
                log.error(f"--remote-sync: the upload to {self.url} failed: {error!r}. Training goes on.")
                self._wake.set()
            self._stop.wait(self.frequency)

    def _local_files(self) -> Iterator[tuple[str, Path]]:
        """Yield the relative names and the paths of the run's files in the order in which they are uploaded."""
        found = [
            path
            for path in self.folder.path.rglob("*")
            if path.is_file() and not path.is_symlink() and path.name != LOCK_NAME and not self._is_hidden(path)
        ]
        checkpoints = self.folder.checkpoints

        def place(path: Path) -> tuple[bool, bool, bool, bool, str]:
            """Return a sort key for the order of uploads: a manifest comes after the files of its checkpoint."""
            within = path.relative_to(checkpoints).parts if path.is_relative_to(checkpoints) else ()
            is_step = bool(within) and STEP.fullmatch(within[0]) is not None
            return path.name == LATEST, not within, not is_step, path.name == MANIFEST, path.name

        for path in sorted(found, key=place):
            yield path.relative_to(self.folder.path).as_posix(), path

    def _is_hidden(self, path: Path) -> bool:
        """Return True for a temporary file or folder, whose name begins with a dot.

        The file ``.metadata`` of a sharded checkpoint (PyTorch's DCP) is not temporary.
        """
        within = path.relative_to(self.folder.path).parts
        if STEP.fullmatch(path.parent.name):
            within = within[:-1]
        return any(part.startswith(".") for part in within)

    def _send(self, name: str, path: Path) -> int:
        """Upload a file of the run unless the remote copy has it, and return the bytes that were sent."""
        status = path.stat()
        version = (status.st_ino, status.st_mtime_ns, status.st_size)
        if self._sent.get(name) == version:
            return 0
        # A hard link to a file that was already uploaded under another name is copied within the remote file system.
        twin = next((other for other, theirs in self._sent.items() if theirs == version), None)
        remote, sent = f"{self._root}/{name}", 0
        if not self._is_there(remote, status):
            for attempt in range(ATTEMPTS):
                try:
                    sent = self._put(path, remote, None if twin is None else f"{self._root}/{twin}")
                    break
                except Exception:
                    if attempt == ATTEMPTS - 1 or not path.exists():
                        raise
                    self._stop.wait(FIRST_WAIT * 2**attempt)
        self._sent[name] = version
        return sent

    def _put(self, path: Path, remote: str, twin: str | None) -> int:
        """Upload a file, or copy its hard link ``twin`` within the remote file system; return the bytes that were sent.

        Both ``remote`` and ``twin`` are remote paths.
        """
        folder, _, name = remote.rpartition("/")
        self._fs.makedirs(folder, exist_ok=True)
        target = f"{folder}/.{name}.tmp" if self._is_renaming else remote
        sent = 0
        try:
            if twin is None:
                raise FileNotFoundError
            self._fs.cp_file(twin, target)
        except (FileNotFoundError, NotImplementedError):
            self._fs.put_file(str(path), target)
            sent = path.stat().st_size
        if self._is_renaming:
            self._fs.mv(target, remote)
        return sent

    def _is_there(self, remote: str, status: os.stat_result) -> bool:
        """Return True if the remote file has the local file's size and is not older: an earlier session uploaded it."""
        try:
            is_as_long = self._fs.info(remote)["size"] == status.st_size
            return bool(is_as_long and self._fs.modified(remote).timestamp() >= status.st_mtime)
        except (FileNotFoundError, NotImplementedError):
            return False

    def _steps(self) -> dict[int, str]:
        """Return the remote paths of complete checkpoints by step; a sharded one is complete once it has a manifest."""
        found = {}
        for path in self._checkpoints():
            match = STEP.fullmatch(path.rpartition("/")[2])
            if match and (path.endswith(".pt") or self._fs.exists(f"{path}/{MANIFEST}")):
                found[int(match[1])] = path
        return found

    def _checkpoints(self) -> list[str]:
        """Return the remote paths of all checkpoints, ``step_N.pt`` (a file) and ``step_N`` (a folder of shards)."""
        self._fs.invalidate_cache()
        try:
            paths = self._fs.ls(f"{self._root}/checkpoints", detail=False)
        except FileNotFoundError:
            return []
        return [path for path in (path.rstrip("/") for path in paths) if STEP.fullmatch(path.rpartition("/")[2])]

    def _download(self, step: int, remote: str) -> str | None:
        """Download the checkpoint of a step and the records; return None, or why the checkpoint cannot be used."""
        checkpoints = Checkpoints(self.folder.checkpoints)
        path = self.folder.checkpoints / remote.rpartition("/")[2]

        def download(temporary: Path) -> None:
            """Download the checkpoint to a temporary path; raise CheckpointError if damaged or of another step."""
            if path.suffix:
                self._fs.get_file(remote, str(temporary))
            else:
                for name in self._fs.ls(remote, detail=False):
                    self._fs.get_file(name, str(temporary / name.rpartition("/")[2]))
            if _step_of(read_saved(temporary, tensors=False)) != step:
                raise CheckpointError("it holds another step than its name says")

        self.folder.checkpoints.mkdir(parents=True, exist_ok=True)
        try:
            if path.suffix:
                replace_file(path, download)
            else:
                shutil.rmtree(path, ignore_errors=True)  # ``write_folder`` does not replace an existing, damaged folder
                write_folder(path, download)
        except CheckpointError as error:
            return f"{self.url}/checkpoints/{path.name} is not used: {error}"
        checkpoints.begin(path)
        for name in RECORDS:
            with contextlib.suppress(FileNotFoundError):
                replace_file(self.folder.path / name, functools.partial(self._get, name))
        return None

    def _get(self, name: str, path: Path) -> None:
        """Download the file ``name`` of the remote copy to a local path."""
        self._fs.get_file(f"{self._root}/{name}", str(path))


def _step_of(checkpoint: dict[str, Any]) -> int:
    """Return the number of finished training steps in a checkpoint of clipfast; -1 for any other checkpoint."""
    own = checkpoint.get("clipfast")
    progress = own.get("progress") if isinstance(own, dict) else None
    return int(progress["step"]) if isinstance(progress, dict) else -1
