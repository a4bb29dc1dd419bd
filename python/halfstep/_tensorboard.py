"""TensorBoard event files without TensorBoard.

A file is a row of records: length (uint64), masked CRC-32C of these eight bytes, the bytes, their masked CRC-32C. Each holds one
Event in protocol-buffer encoding: wall_time = 1 (double), step = 2 (varint), file_version = 3 (string, in the first), summary = 5,
which holds value = 1 {tag = 1 (string), simple_value = 2 (float)}.
"""

import os
import socket
import struct
import time
from pathlib import Path


def _table():
    rows = []
    for byte in range(256):
        for _ in range(8):
            byte = byte >> 1 ^ (0x82F63B78 if byte & 1 else 0)
        rows.append(byte)
    return rows


_TABLE = _table()


def crc32c(data):
    """CRC-32C (Castagnoli) of bytes."""
    crc = 0xFFFFFFFF
    for byte in data:
        crc = crc >> 8 ^ _TABLE[(crc ^ byte) & 255]
    return crc ^ 0xFFFFFFFF


def _masked(data):
    crc = crc32c(data)
    return struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)


def _varint(number):
    number &= (1 << 64) - 1  # a negative step as protocol buffers write it
    out = bytearray()
    while number > 127:
        out.append(number & 127 | 128)
        number >>= 7
    return bytes(out + bytes([number]))


def _bytes_field(number, data):
    return _varint(number << 3 | 2) + _varint(len(data)) + data


class Writer:
    """One event file in `folder`, which TensorBoard shows as one run. Also a context manager."""

    def __init__(self, folder):
        Path(folder).mkdir(parents=True, exist_ok=True)
        now = time.time()
        self.path = Path(folder) / f"events.out.tfevents.{int(now)}.{socket.gethostname()}.{os.getpid()}.{time.monotonic_ns()}"
        self._file = open(self.path, "xb")  # noqa: SIM115  closed by close()
        self._event(now, _bytes_field(3, b"brain.Event:2"))

    def _event(self, wall_time, rest, step=0):
        event = b"\x09" + struct.pack("<d", wall_time) + (b"\x10" + _varint(step) if step else b"") + rest
        length = struct.pack("<Q", len(event))
        self._file.write(length + _masked(length) + event + _masked(event))

    def scalar(self, tag, value, step, wall_time=None):
        """`value` under `tag` at `step`; non-finite values are written as they are."""
        value = _bytes_field(1, tag.encode()) + b"\x15" + struct.pack("<f", _single(value))
        self._event(time.time() if wall_time is None else wall_time, _bytes_field(5, _bytes_field(1, value)), int(step))

    def flush(self):
        self._file.flush()

    def close(self):
        self._file.close()

    def __enter__(self):
        return self

    def __exit__(self, *exception):
        self.close()


def _single(value):
    """As an FP32 number: what is beyond it is infinite."""
    value = float(value)
    try:
        struct.pack("<f", value)
    except OverflowError:
        return float("inf") if value > 0 else float("-inf")
    return value
