"""Traces of a run: record() writes one, read() reads it, simulate() replays it under another policy (docs/telemetry.md)."""

from ._recording import Recorder, Trace, read, record
from ._replay import SimResult, plot, policy_of, simulate, table

__all__ = ["Recorder", "SimResult", "Trace", "plot", "policy_of", "read", "record", "simulate", "table"]
