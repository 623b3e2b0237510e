"""The checkpoints of a run: their names, writing them during training, and finding the newest complete one."""

import contextlib
import logging
import math
import re
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

from ..distributed.world import ALONE, World
from ..io.files import DiskFullError, replace_file
from .background import Background, HostCopy
from .checkpoint import CheckpointError, read_checkpoint, write_checkpoint
from .sharded import read_parts, read_rest, write_parts

log = logging.getLogger("clipfast")
LATEST = "epoch_latest.pt"
STEP = re.compile(r"step_(\d+)(?:\.pt)?")
EPOCH = re.compile(r"epoch_(\d+)\.pt")


class Found(NamedTuple):
    """A checkpoint with its content, and one line for each newer one that is damaged.

    For a folder, the content has no tensors.
    """

    path: Path | None
    content: dict[str, Any]
    damaged: list[str]


class Checkpoints:
    """The folder of a run's checkpoints.

    ``step_N.pt`` is the state after N steps, and so is a folder ``step_N``, into which each process writes its parts.
    ``epoch_latest.pt`` is a hard link to the file from which a run continues, unless there is a folder of a later step.
    It moves to a new file only when that is on the disk. ``epoch_N.pt`` is a hard link to a file that is never removed.

    Args:
        folder: the folder, which may not exist yet.
        keep_last: the number of ``step_N.pt`` and ``step_N`` to keep.
        after_save: a function that the writing thread calls after each checkpoint is on the disk.
        only_last_epoch: whether to remove each ``epoch_N.pt`` as soon as there is a new one.
        is_held: returns whether the folder still belongs to this run.
        world: the processes that write the parts of a folder, with a group of their own.
    """

    def __init__(
        self,
        folder: Path,
        keep_last: int = 2,
        after_save: Callable[[], object] | None = None,
        *,
        only_last_epoch: bool = False,
        is_held: Callable[[], bool] = lambda: True,
        world: World = ALONE,
    ) -> None:
        self.folder, self.keep_last, self.after_save = folder, keep_last, after_save
        self.only_last_epoch, self._is_held = only_last_epoch, is_held
        self.latest = folder / LATEST
        self.saved_at = time.monotonic()
        self._world, self._background, self._host_copy = world, Background(), HostCopy(world)

    def step_path(self, step: int) -> Path:
        """Return the path of the run's checkpoint file after ``step`` steps."""
        return self.folder / f"step_{step}.pt"

    def steps(self) -> dict[int, Path]:
        """Return the paths of a run's checkpoints ``step_N.pt`` and ``step_N`` by their steps, the last step first."""
        return _numbered(self.folder, STEP)

    def kept(self) -> list[Path]:
        """Return the paths of all checkpoints of a run, the newest first, each under the first of its names."""
        steps = self.steps()
        later = self._folders_after(self.latest)
        names = [*later, self.latest, *steps.values(), *_numbered(self.folder, EPOCH).values()]
        files: dict[tuple[int, int], Path] = {}
        for path in names:
            with contextlib.suppress(FileNotFoundError):
                status = path.stat()
                files.setdefault((status.st_dev, status.st_ino), path)
        return list(files.values())

    def newest_whole(self) -> Found:
        """Return the newest checkpoint whose checksums are right; its path is None if there is no checkpoint at all.

        Raises:
            CheckpointError: there are checkpoints, and none is whole.
        """
        damaged: list[str] = []
        kept = self.kept()
        # runs of OpenCLIP may have no epoch_latest.pt
        if self.steps() and kept[0] != self.latest and not kept[0].is_dir():
            damaged.append(f"{self.latest} is missing")
        for path in kept:
            try:
                content = read_saved(path, tensors=False)
            except CheckpointError as error:
                damaged.append(str(error))
                continue
            return Found(path, content, damaged)
        if kept:
            raise CheckpointError(f"{self.folder} holds no checkpoint that is whole: {'; '.join(damaged)}")
        return Found(None, {}, [])

    def begin(self, resumed: Path | None = None) -> None:
        """Remove incomplete files of a killed process, and make the checkpoint from which the run continues the newest.

        For that, ``epoch_latest.pt`` moves, and folders of later steps are removed, which would be newer. If the run
        continues from a folder, files of later steps are removed too.
        """
        for path in self.folder.glob(".*.tmp"):
            _remove(path)
        if resumed is None:
            return
        name = STEP.fullmatch(resumed.name)
        if resumed.is_dir() and name:
            if not any(path.samefile(resumed) for path in self._folders_after(self.latest)):
                self.latest.unlink(missing_ok=True)
            later = [path for number, path in self.steps().items() if number > int(name[1])]
        else:
            if not (self.latest.exists() and self.latest.samefile(resumed)):
                self._link(resumed, self.latest)
            later = self._folders_after(self.latest)
        for path in later:
            _remove(path)

    def save(
        self, checkpoint: dict[str, Any], step: int, *, milestone: int | None = None, good: int | None = None,
        in_parts: bool = False,
    ) -> None:  # fmt: skip
        """Copy a checkpoint, and write the copy in the background, after the previous write is finished.

        Args:
            checkpoint: the content to save; when this returns, its tensors are copied, or the GPU has the copies in its
                queue.
            step: number of steps that are finished.
            milestone: number of finished epochs, to keep it as ``epoch_N.pt``.
            good: a step; the newest checkpoint of this step or of an earlier one is kept too.
            in_parts: write a folder into which each process of ``world`` writes a part. All of them must call this, and
                an error of one becomes an error of all. Otherwise only this process writes.
        """
        self._background.wait()
        self.saved_at = time.monotonic()
        copied, path = self._host_copy(checkpoint), self.step_path(step)
        path = path.with_suffix("") if in_parts else path

        def write() -> None:
            """Write the copy of the checkpoint in the background thread."""
            if in_parts:
                self._world.on_main(self._refuse_another)
                write_parts(path, copied, self._world)
                return
            self._refuse_another()
            write_checkpoint(path, copied)
            self._link(path, self.latest)
            if milestone is not None:
                self._link(path, self.folder / f"epoch_{milestone}.pt")

        self._background.start(lambda: self._written(path, step, write, milestone, good))

    def wait(self, seconds: float = math.inf) -> Exception | None:
        """Wait until no checkpoint is being written, or for ``seconds``, and return the error of a failed write."""
        return self._background.wait(seconds)

    def finish(self) -> None:
        """Wait until the last checkpoint is on the disk.

        Raises:
            DiskFullError: there is no space for it.
            OSError: it cannot be written for another reason.
        """
        error = self.wait()
        if error is not None:
            raise error

    def _written(
        self, path: Path, step: int, write: Callable[[], object], milestone: int | None, good: int | None
    ) -> None:
        """Write a run's checkpoint to ``path``, and remove the checkpoints that it replaces."""
        try:
            self._host_copy.wait()
            write()
        except Exception as error:
            named, kept = _named(error, path), self.kept()
            if self._world.is_main:
                log.error(f"{named}. Training goes on.{f' The last good checkpoint is {kept[0]}' if kept else ''}")
            raise named from error.__cause__
        if not self._world.is_main:
            return
        self._remove_old(path, step, milestone, good)
        log.info(f"Saved {path}")
        if self.after_save is not None:
            self.after_save()

    def _refuse_another(self) -> None:
        """Refuse to write checkpoints into a folder that no longer belongs to this run.

        Raises:
            OSError: the run's folder was renamed or removed.
        """
        if not self._is_held():
            raise OSError(f"{self.folder.parent} was renamed or removed")

    def _folders_after(self, file: Path) -> list[Path]:
        """Return the folders ``step_N`` whose step is later than the step of ``file``, the newest first.

        A file no longer has its name ``step_N.pt`` if enough later checkpoints exist, or if the folder was copied.
        """
        folders, files = dict[int, Path](), dict[int, Path]()
        for number, path in self.steps().items():
            (folders if path.is_dir() else files)[number] = path
        own = [number for number, path in files.items() if file.exists() and path.samefile(file)]
        last = max(own or files, default=-1)
        return [path for number, path in folders.items() if number > last]

    def _remove_old(self, written: Path, step: int, milestone: int | None, good: int | None) -> None:
        """Remove old checkpoints, and checkpoints of steps after ``step``, which the run has not reached yet."""
        steps = self.steps()
        past = [number for number in steps if number <= step]
        kept = past[: self.keep_last] + [number for number in past if good is not None and number <= good][:1]
        old = [steps[number] for number in steps.keys() - set(kept)]
        if self.only_last_epoch and milestone is not None:
            old += [path for number, path in _numbered(self.folder, EPOCH).items() if number != milestone]
        same = self.step_path(step)
        for path in (*old, same, same.with_suffix("")):
            if path != written and path.exists():
                with contextlib.suppress(OSError):
                    _remove(path)

    def _link(self, path: Path, name: Path) -> None:
        """Make ``name`` a hard link to the checkpoint ``path``."""

        def link(temporary: Path) -> None:
            """Make a hard link to a checkpoint, or a copy where the file system has no links."""
            temporary.unlink()
            try:
                temporary.hardlink_to(path)
            except OSError:  # the file system has no hard links
                shutil.copyfile(path, temporary)

        replace_file(name, link)


def read_saved(path: Path, *, tensors: bool = True) -> dict[str, Any]:
    """Return the content of a checkpoint, a file or a folder; without ``tensors``, a folder's tensors are left out.

    The tensors of a file stay on the disk until they are used.

    Raises:
        CheckpointError: it is missing or damaged, or holds anything but tensors and plain values.
    """
    if path.is_dir():
        return read_parts(path) if tensors else read_rest(path)
    return read_checkpoint(path, mmap=True)


def _remove(path: Path) -> None:
    """Remove a checkpoint, a file or a folder. A partly removed folder never keeps its name."""
    if path.is_dir():
        hidden = path if path.name.startswith(".") else path.rename(path.with_name(f".{path.name}.tmp"))
        shutil.rmtree(hidden)
    else:
        path.unlink()


def _named(error: Exception, path: Path) -> OSError:
    """Return an error that says in one line why the checkpoint ``path`` cannot be written."""
    if isinstance(error, DiskFullError):
        return error
    reason = (error.strerror if isinstance(error, OSError) else None) or str(error)
    return OSError(f"{path} cannot be written: {reason}")


def _numbered(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    """Return the checkpoints in ``folder`` whose names match a pattern, by the number in them, the largest first."""
    found = [(match, path) for path in folder.glob("*") if (match := pattern.fullmatch(path.name))]
    return dict(sorted(((int(match[1]), path) for match, path in found), reverse=True))
