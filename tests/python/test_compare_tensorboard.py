"""TensorBoard files, read back by a parser written apart from the writer, and by TensorBoard where it is installed."""

import importlib.util
import math
import struct
from pathlib import Path

import pytest

from halfstep._library import _C
from halfstep._tensorboard import Writer, crc32c


def crc_bit_by_bit(data):
    crc = 0xFFFFFFFF
    for byte in data:
        for bit in range(8):
            feedback = (crc ^ byte >> bit) & 1
            crc = crc >> 1 ^ (0x82F63B78 if feedback else 0)
    return ~crc & 0xFFFFFFFF


def unmask(masked):
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF


def fields(data):
    """[(number, value)] of a protocol buffer message."""
    at, found = 0, []

    def varint():
        nonlocal at
        value = shift = 0
        while True:
            byte = data[at]
            at += 1
            value |= (byte & 127) << shift
            shift += 7
            if byte < 128:
                return value

    while at < len(data):
        key = varint()
        kind = key & 7
        if kind == 0:
            value = varint()
        elif kind == 2:
            length = varint()
            value, at = data[at:at + length], at + length
        else:
            size = {1: 8, 5: 4}[kind]
            value, at = struct.unpack("<d" if kind == 1 else "<f", data[at:at + size])[0], at + size
        found.append((key >> 3, value))
    return found


def events(path):
    data, at, found = path.read_bytes(), 0, []
    while at < len(data):
        head = data[at:at + 8]
        (length,), (crc,) = struct.unpack("<Q", head), struct.unpack("<I", data[at + 8:at + 12])
        body = data[at + 12:at + 12 + length]
        assert unmask(crc) == crc_bit_by_bit(head) and unmask(struct.unpack("<I", data[at + 12 + length:at + 16 + length])[0]) == crc_bit_by_bit(body)
        found.append(dict(fields(body)))
        at += 16 + length
    return found


def scalars(path):
    found = []
    for event in events(path)[1:]:
        value = dict(fields(dict(fields(event[5]))[1]))
        found.append((value[1].decode(), event.get(2, 0), value[2]))
    return found


def test_crc32c_of_the_known_string():
    assert crc32c(b"123456789") == 0xE3069283 and crc32c(b"") == 0 and crc32c(bytes(32)) == 0x8A9136AA  # RFC 3720, B.4


def test_files_read_back(tmp_path):
    written = [("amp/loss_scale", 1, 65536.0), ("amp/underflow_share/0.weight/weight gradient", 300, 0.25), ("größe", 2**40, -1.5), ("x" * 300, 0, 1e60), ("nan", 7, math.nan)]
    with Writer(tmp_path / "a") as writer:
        for tag, step, value in written:
            writer.scalar(tag, value, step, wall_time=12.5)
    first, *rest = events(writer.path)
    assert first[3] == b"brain.Event:2" and {event[1] for event in rest} == {12.5} and writer.path.name.startswith("events.out.tfevents.")
    found = scalars(writer.path)
    assert found[:3] == [(tag, step, value) for tag, step, value in written[:3]] and found[3] == ("x" * 300, 0, math.inf) and math.isnan(found[4][2])


def test_the_writer_of_cpp_makes_the_same_bytes(tmp_path):
    written = [("amp/loss_scale", 1, 65536.0), ("größe", 2**40, -1.5), ("x" * 300, 0, 1e60), ("low", -1, -1e60), ("nan", 7, math.nan), ("third", 3, 1 / 3), ("tiny", 300, 1e-45), ("zero", 128, -0.0)]
    with Writer(tmp_path / "a") as writer:
        for tag, step, value in written:
            writer.scalar(tag, value, step, wall_time=1234.5 + step)
    first = events(writer.path)[0][1]
    assert writer.path.read_bytes() == _C.tensorboard_first_record(first) + b"".join(_C.tensorboard_record(tag, value, step, 1234.5 + step) for tag, step, value in written)


def test_two_writers_in_one_folder_do_not_meet(tmp_path):
    with Writer(tmp_path) as a, Writer(tmp_path) as b:
        a.scalar("a", 1, 1)
        b.scalar("b", 2, 1)
    assert a.path != b.path and scalars(a.path) == [("a", 1, 1.0)] and scalars(b.path) == [("b", 1, 2.0)]


@pytest.mark.skipif(importlib.util.find_spec("tensorboard") is None, reason="tensorboard is not installed")
def test_tensorboard_reads_them(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    with Writer(tmp_path) as writer:
        for step in range(5):
            writer.scalar("amp/loss_scale", 2.0**step, step)
    reader = EventAccumulator(str(tmp_path))
    reader.Reload()
    assert [(e.step, e.value) for e in reader.Scalars("amp/loss_scale")] == [(s, 2.0**s) for s in range(5)] and Path(writer.path).exists()
