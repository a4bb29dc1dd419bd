"""Files that are whole or not there: whoever opens the name sees the old file or the new one."""

import contextlib
import itertools
import os
import shutil
import tempfile

_count = itertools.count()


@contextlib.contextmanager
def replacing(path, text=False, sync=True):
    """An open file that takes `path`'s place when the block ends: written beside it, synced and renamed. An error in the block leaves `path` as it was.

    sync False: whoever reads sees all of it or nothing just as well, but a machine that loses power may keep neither.
    """
    target = os.path.realpath(os.fspath(path))  # a link keeps pointing where it does
    temporary = f"{target}.tmp.{os.getpid()}.{next(_count)}"
    descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        with os.fdopen(descriptor, "w" if text else "wb", encoding="utf-8" if text else None) as file:
            yield file
            file.flush()
            if sync:
                os.fsync(file.fileno())
        os.replace(temporary, target)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise
    if sync:
        _sync(os.path.dirname(target))


def _sync(path):
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def staged(path):
    """The path of a file that is not there yet, in a folder beside `path`, for writers that want a name. When the block ends it takes `path`'s
    place, after the other files that were written beside it took theirs. An error in the block leaves everything as it was."""
    target = os.path.realpath(os.fspath(path))
    folder, name = os.path.split(target)
    stage = tempfile.mkdtemp(prefix=f"{name}.tmp.", dir=folder)
    try:
        with open(os.path.join(stage, name), "wb") as file:
            mode = os.fstat(file.fileno()).st_mode & 0o777  # as any new file here; some writers make theirs private
        os.unlink(file.name)
        yield file.name
        for part in sorted(os.listdir(stage), key=lambda part: part == name):
            os.chmod(os.path.join(stage, part), mode)
            _sync(os.path.join(stage, part))
            os.replace(os.path.join(stage, part), os.path.join(folder, part))
    finally:
        shutil.rmtree(stage, ignore_errors=True)
    _sync(folder)
