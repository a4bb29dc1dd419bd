"""compare(): every arm and seed trained in a process of its own, and what they say together."""

import datetime
import hashlib
import inspect
import json
import os
import platform
import re
import select
import shlex
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

from . import _report, _schema, _worker
from ._extras import need
from ._file import replacing
from ._job import parse_arms
from ._library import PACKAGE, _C, cuda_status
from ._progress import progress

_BOOT = "import sys; sys.path[0] = sys.argv[3]; from halfstep._worker import main; main(sys.argv[1], int(sys.argv[2]))"


@dataclass
class Comparison:
    """What compare() returns; printed, it is the table of the command line."""

    data: dict          #: report.json
    out: "Path | None"  #: the folder that holds the files

    @property
    def exit_status(self):
        """0 equivalent (or better), 2 worse, 3 cannot tell, 1 an arm failed."""
        return self.data["exit_status"]

    @property
    def verdicts(self):
        """{arm: "equivalent", "worse", "better" or "cannot tell"} of every arm but the first."""
        return {c["arm"]: c["verdict"] for c in self.data["comparisons"]}

    def __str__(self):
        return _report.text(self.data)


def _place(make):
    """(file, name) by which another process finds make()."""
    if isinstance(make, (str, os.PathLike)):
        file, colon, name = str(make).rpartition(":")
        if not colon or not file:
            file, name = str(make), "make"
        if not Path(file).is_file():
            raise ValueError(f"make: {file}: no such file; expected script.py:function")
        if not name.isidentifier():
            raise ValueError(f"make: {name!r} is no name of a function; expected script.py:function")
        return str(Path(file).resolve()), name
    if not callable(make):
        raise TypeError(f"make is {type(make).__name__}; expected a function of a script, or script.py:function")
    name, file = getattr(make, "__qualname__", type(make).__name__), inspect.getsourcefile(make) if inspect.isfunction(make) else None
    if file is None or not name.isidentifier() or not Path(file).is_file():
        raise ValueError(f"make: {name} cannot be found by another process; expected a function at the top level of a file")
    return str(Path(file).resolve()), name


def _seeds(seeds):
    if isinstance(seeds, int) and not isinstance(seeds, bool) and seeds >= 1:
        return list(range(seeds))
    found = list(seeds) if isinstance(seeds, (list, tuple, range)) else None
    if not found or any(isinstance(s, bool) or not isinstance(s, int) or s < 0 for s in found) or len(set(found)) < len(found):
        raise ValueError(f"seeds is {seeds!r}; expected a whole number from 1, or different seeds from 0")
    return found


def _device(device):
    if device not in ("auto", "cpu", "cuda"):
        raise ValueError(f"device is {device!r}; expected auto, cpu or cuda")
    status = cuda_status()
    if device == "cuda" and status != "ready":
        raise ValueError(f"device is 'cuda', but halfstep's CUDA side is {status}")
    return ("cuda" if status == "ready" else "cpu") if device == "auto" else device


def environment(device):
    """Versions and machine, as the report states them."""
    found = {"halfstep": _C.build_info()["version"], "torch": torch.__version__, "python": platform.python_version(), "system": f"{platform.system()} {platform.release()} {platform.machine()}",
             "cpu": _cpu_name(), "cpu_path": _C.cpu_path(), "cores": os.cpu_count(), "threads": torch.get_num_threads(), "device": device}
    if device == "cuda":
        found.update(gpu=torch.cuda.get_device_name(), cuda=torch.version.cuda)
    return found


def _cpu_name():
    try:
        return re.search(r"model name\s*:\s*(.+)", Path("/proc/cpuinfo").read_text())[1]
    except (OSError, TypeError):
        return platform.processor()


def _digest(value):
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()[:16]


class _Runs:
    """The runs of one comparison in a folder; what is there from an earlier call is taken as it is."""

    def __init__(self, file, name, device, every, out):
        self._file, self._name, self._device, self._every, self._folder = file, name, device, every, out / "runs"
        self._folder.mkdir(parents=True, exist_ok=True)
        self._common = {"make": name, "source": _worker.file_hash(file), "device": device, "every": every, "torch": torch.__version__, "halfstep": _C.build_info()["version"]}

    def _spec(self, arm, seed, look):
        stem = f"{re.sub(r'[^A-Za-z0-9.]+', '-', arm.name).strip('-')[:40]}-{_digest(arm.options())[:6]}-seed{seed}"
        key = _digest({**self._common, "arm": arm.options(), "seed": seed, "look": look})
        return {"key": key, "file": self._file, "make": self._name, "arm": {"name": arm.name, **arm.options()}, "seed": seed, "device": self._device, "every": self._every, "look": look,
                "result": str(self._folder / f"{stem}.json"), "trace": str(self._folder / f"{stem}.trace"), "log": str(self._folder / f"{stem}.log")}

    def _earlier(self, spec):
        """The result of an earlier call, if it is of this very run and no file that it used was changed."""
        try:
            result = json.loads(Path(spec["result"]).read_text())
        except (OSError, ValueError):
            return None
        if not isinstance(result, dict) or result.get("key") != spec["key"] or "error" in result:
            return None
        return result if all(_worker.file_hash(path) == then for path, then in result["sources"].items()) else None

    def run(self, arm, seed, look, bar):
        """The result: of an earlier call, or of a process that is started now."""
        spec = self._spec(arm, seed, look)
        bar.begin(f"{arm.name}, seed {seed}")
        result = self._earlier(spec)
        if result is not None:
            bar.end(": there already")
            return result
        result = self._start(spec, bar)
        bar.end(": failed" if "error" in result else "")
        if "error" in result:
            result["error"].update(seed=seed, log=spec["log"])
        return result

    def _start(self, spec, bar):
        paths = {key: Path(spec[key]) for key in ("result", "log")}
        paths["result"].unlink(missing_ok=True)
        (read, write), specification = os.pipe(), paths["result"].with_suffix(".spec")
        specification.write_text(json.dumps(spec))
        try:
            with open(paths["log"], "wb") as log:
                child = subprocess.Popen([sys.executable, "-c", _BOOT, str(specification), str(write), str(PACKAGE.parent)], stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=[write])
            os.close(write)
            write = None
            try:
                self._listen(read, bar)
                status = child.wait()
            except BaseException:
                child.kill()
                child.wait()
                raise
        finally:
            os.close(read)
            if write is not None:
                os.close(write)
            specification.unlink(missing_ok=True)
        try:
            return json.loads(paths["result"].read_text())
        except (OSError, ValueError):
            why = f"killed by signal {-status}" if status < 0 else f"ended with status {status} and wrote no result"
            return {"error": {"line": f"the process was {why}" if status < 0 else f"the process {why}", "load": False}}

    @staticmethod
    def _listen(read, bar):
        """Until the child closes its end."""
        rest = b""
        while True:
            select.select([read], [], [])
            data = os.read(read, 65536)
            if not data:
                return
            *lines, rest = (rest + data).split(b"\n")
            if lines:
                bar.at(*map(int, lines[-1].split()))


def _train(runs, arms, seeds):
    """[{name, options, runs, failed}] over all arms and seeds, seed by seed, so that the arms share the machine's moods.

    Without the first arm there is nothing to compare with: when it fails, all ends.
    """
    found = [{"name": arm.name, "options": arm.options(), "runs": [], "failed": None} for arm in arms]
    with progress(len(arms) * len(seeds)) as bar:
        for seed in seeds:
            for arm, entry in zip(arms, found):
                if entry["failed"] or found[0]["failed"]:
                    continue
                result = runs.run(arm, seed, seed == seeds[0], bar)
                error = result.get("error")
                if error and error["load"]:
                    raise ValueError(error["line"])
                if error:
                    entry["failed"] = {k: error[k] for k in ("seed", "line", "log")}
                else:
                    entry["runs"].append({k: v for k, v in result.items() if k not in ("key", "sources")})
    return found


def _command(make, arms, seeds, delta, every):
    words = ["halfstep", "compare", make, "--seeds", str(len(seeds)) if seeds == list(range(len(seeds))) else ",".join(map(str, seeds)) + "," * (len(seeds) == 1), "--delta", str(delta), "--every", str(every)]
    return shlex.join(words + [word for arm in arms for word in ("--arms", arm.name)])


def compare(make, arms=("fp32", "mixed"), seeds=8, delta="0.5pp", out=None, *, every=50, device="auto"):
    """Trains every arm with every seed and says whether it is as good as the first arm. Returns a Comparison.

    make: a function (arm, seed) -> Job at the top level of a file, or "script.py:function". arms: Arms or texts (Arm.parse); the others
    are compared with the first. seeds: how many, or which. delta: the difference that does not matter: "0.5pp" (percentage points of a
    share such as accuracy) or a number in the metric's unit; of a share, in points. out: a folder for report.json, report.html,
    report.png, events/ and runs/; None: "compare". every: the first seed of each FP16 arm is compared with FP32 in every so many steps.

    A run that is in `out` already and was made of the same files and options is not repeated, so an interrupted compare goes on.
    An arm that fails is left out from there on and reported. ValueError: an argument, or a script that cannot be used.
    """
    if _worker.running:
        raise RuntimeError('compare() is called when its own script is imported; put the call under `if __name__ == "__main__":`')
    file, name = _place(make)
    device, seeds = _device(device), _seeds(seeds)
    arms = parse_arms(list(arms) if isinstance(arms, (list, tuple)) else arms, device)
    if len(arms) < 2:
        raise ValueError(f"arms: there {'is' if arms else 'are'} {len(arms)}; expected two or more, the first to compare with")
    _report.parse_delta(delta)
    if isinstance(every, bool) or not isinstance(every, int) or every < 1:
        raise ValueError(f"every is {every!r}; expected a whole number from 1")
    for module in ("scipy.stats", "numpy", "matplotlib"):
        need(module)  # before hours of training, not after them
    out = Path("compare" if out is None else out)
    _folder(out)
    found = _train(_Runs(file, name, device, every, out), arms, seeds)
    config = {"make": f"{Path(file).name}:{name}", "source": _worker.file_hash(file), "seeds": seeds, "every": every, "device": device,
              "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")}
    if not found[0]["runs"]:
        raise RuntimeError(f"arm {found[0]['name']!r}, with which the others are compared, failed: {found[0]['failed']['line']} (log: {found[0]['failed']['log']})")
    return finish(found, delta, out, environment(device), config, _command(f"{Path(file).name}:{name}", arms, seeds, delta, every))


def _folder(out):
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ValueError(f"out: {out}: {error.strerror}") from None


def from_reports(paths, delta, out=None):
    """The arms of several reports, of programs in any language, compared as if they had been trained here. The first arm of the first is what the others are compared with."""
    reports = [(Path(path), _schema.read(path)) for path in paths]
    arms = [({**arm, "failed": arm.get("failed")}, path) for path, report in reports for arm in report["arms"]]
    names = [arm["name"] for arm, _ in arms]
    for arm, path in arms:
        if names.count(arm["name"]) > 1:
            arm["name"] = f"{path.stem}:{arm['name']}"
    arms = [{k: v for k, v in arm.items() if k != "summary"} for arm, _ in arms]
    if len(arms) < 2:
        raise ValueError(f"{paths[0]} holds one arm; expected two or more in all")
    twice = next((a["name"] for a in arms if [b["name"] for b in arms].count(a["name"]) > 1), None)
    if twice:
        raise ValueError(f"two arms are called {twice!r}; give the files or arms different names")
    metric = {"metric": reports[0][1].get("metric") or {}}
    for run in arms[0]["runs"]:  # a program may say the metric once, for all
        run.setdefault("metric", metric["metric"].get("name") or next(iter(run["metrics"])))
        run.setdefault("better", metric["metric"].get("better") or "higher")
    notes = sorted({f"{path.name} was made on another machine ({report['environment'].get('cpu', '?')}) than {reports[0][0].name}: its times do not compare"
                    for path, report in reports[1:] if report.get("environment") and reports[0][1].get("environment") and report["environment"].get("cpu") != reports[0][1]["environment"].get("cpu")})
    if out is not None:
        _folder(Path(out))
    config = {"from": [str(p) for p in paths]}
    return finish(arms, delta, None if out is None else Path(out), reports[0][1].get("environment") or {}, config, f"halfstep compare --from {' '.join(map(str, paths))} --delta {delta}", notes)


def finish(arms, delta, out, where, config, command, notes=()):
    """The report of these arms, and its files where there is a folder."""
    from . import _report_events, _report_html, _report_png

    report = _report.build(arms, delta, where, config, command, notes)
    if out is not None:
        for name, text in (("report.json", json.dumps(report, indent=1, allow_nan=False) + "\n"), ("report.html", _report_html.page(report))):
            with replacing(out / name, text=True) as file:
                file.write(text)
        _report_png.draw(report, out / "report.png")
        shutil.rmtree(out / "events", ignore_errors=True)
        _report_events.write(report, out / "events")
    return Comparison(report, out)
