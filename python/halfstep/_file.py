"""Files that are whole or not there: whoever opens the name sees the old file or the new one."""

import contextlib
import itertools
import os

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
    if not sync:
        return
    entry = os.open(os.path.dirname(target), os.O_RDONLY)
    try:
        os.fsync(entry)
    finally:
        os.close(entry)
