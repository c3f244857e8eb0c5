#!/usr/bin/env python3
"""`make gpu-evidence`: everything that needs a GPU, in one resumable run that writes one JSON file.

Steps: build (only what is missing of the libraries), doctor, tests of the operators and of training in a byte budget
(skips are failures), golden outputs, conv, pool, copy and training benchmarks, compute-sanitizer's memcheck and
racecheck over a small subset; with --full also the large tests and every layer. The
file bench/results/<device>-<date>.json is renewed after every step and every row, so that a run can be cut off at any
moment and continued with --resume. `splitkern bench report FILE` prints its tables. This program needs only Python;
what it runs needs torch and splitkern, from this folder.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import sysconfig
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
LIBRARIES = {"_ops": "_ops.so", "_core": f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"}

# What the Hopper kernels compute for a few small shapes, for the tests that run them on the CPU.
GOLDEN = ROOT / "tests" / "kernel_checks" / "golden_sm90.json"

PASSED = "passed"
FAILED = "failed"
TIMED_OUT = "timed out"
NOT_RUN = "not run"
UNAVAILABLE = "unavailable"

TAIL_LINES = 60
EXIT_OUT_OF_TIME = 4
GROUPS = {
    "bench": ("conv", "pool", "copy", "training-vgg19", "training-resnet50"),
    "training": ("training-vgg19", "training-resnet50"),
    "sanitizer": ("memcheck", "racecheck"),
}

_PROBE = """
import json, platform, torch
if not torch.cuda.is_available():
    raise SystemExit("torch finds no GPU")
p = torch.cuda.get_device_properties(0)
print(json.dumps({
    "device": p.name, "compute_capability": f"{p.major}.{p.minor}", "multiprocessors": p.multi_processor_count,
    "memory_bytes": p.total_memory, "l2_bytes": p.L2_cache_size, "torch": torch.__version__,
    "torch_cuda": torch.version.cuda, "cudnn": torch.backends.cudnn.version(), "python": platform.python_version(),
}))
"""


class UserError(Exception):
    """Something the user can mend."""


@dataclass
class Step:
    """One command and what is read from it.

    Attributes:
        name: of the step.
        command: arguments of the process, run in the repository's root.
        limit_s: it is stopped after that time.
        environment: variables to add.
        record: whether it is a benchmark that keeps its rows in a file, which the evidence takes over.
        read: makes more entries of the step out of the log.
        missing: why it cannot be run here, None where it can.
    """

    name: str
    command: list[str]
    limit_s: float
    environment: dict[str, str] = field(default_factory=dict)
    record: bool = False
    read: Callable[[str], dict[str, Any]] = lambda log: {}
    missing: str | None = None


def write_atomically(path: Path, value: Any) -> None:
    """Writes JSON so that a kill leaves the old file or the new one."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary.write_text(json.dumps(value, indent=1) + "\n")
    os.replace(temporary, path)


# --- what is read from the logs -------------------------------------------------------------------


_XDIST_LINE = re.compile(r"^\[gw\d+\] \[ *\d+%\] (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL) (?P<test>\S.*)$")
_PLAIN_LINE = re.compile(
    r"^(?P<test>tests/.+?) (?P<outcome>PASSED|FAILED|ERROR|SKIPPED|XFAIL)(?: \(.*\))?(?: +\[ *\d+%\])?$"
)


def read_tests(log: str) -> dict[str, Any]:
    """Counts of a pytest run with -v, also of one that was stopped, and what failed, with the reasons it gave."""
    outcomes: dict[str, str] = {}
    reasons = []
    for line in log.splitlines():
        match = _XDIST_LINE.match(line) or _PLAIN_LINE.match(line)
        if match:
            outcomes[match["test"].strip()] = match["outcome"].lower()
        elif line.startswith(("FAILED ", "ERROR ", "DEVICE LOST ")):
            reasons.append(line)
    values = list(outcomes.values())
    counts = {name: values.count(name) for name in ("passed", "failed", "error", "skipped", "xfail")}
    return {"counts": {name: count for name, count in counts.items() if count}, "failures": reasons[:200]}


def read_doctor(log: str) -> dict[str, Any]:
    """The findings of `splitkern doctor --json`."""
    begin = log.find("{")
    try:
        return {"findings": json.loads(log[begin:])} if begin >= 0 else {}
    except ValueError:
        return {}


def read_golden(log: str) -> dict[str, Any]:
    """Golden outputs, which the step left in a file."""
    with contextlib.suppress(OSError, ValueError):
        return {"golden": json.loads(GOLDEN.read_text())}
    return {}


def read_sanitizer(log: str) -> dict[str, Any]:
    """The summaries of compute-sanitizer."""
    lines = [line.strip("= ") for line in log.splitlines() if "SUMMARY" in line]
    return {"summary": lines}


# --- steps ----------------------------------------------------------------------------------------


def make_steps(options: argparse.Namespace) -> list[Step]:
    """Every step, in the order in which they run unless told."""
    python = [sys.executable]
    # Workers share the CPU's cores; one BLAS thread each keeps them from fighting over them.
    tests = [*python, "-m", "pytest", "tests/ops_cuda", "-v", "-rfE", "--tb=short", "-p", "tests.ops_cuda.lost_device"]
    parallel = ["-n", str(options.jobs)] if options.jobs > 1 and _imports("xdist") else []
    timeout = ["--timeout", "120", "--timeout-method", "thread"] if _imports("pytest_timeout") else []
    gpu = {"SPLITKERN_REQUIRE_GPU": "1"}
    bench = [*python, "-m", "splitkern", "bench"]
    extra = ["--budget-ms", str(options.budget_ms)] if options.budget_ms else []
    which = ["--full"] if options.full else ["--core"]
    scale = 8.0 if options.full else 1.0
    memory = [*python, "-m", "pytest", "tests/memory", "-m", "gpu", "-v", "-rfE", "--tb=short"]
    training = ["training", "--device", "cuda", "--precision", "bf16", "--memory-format", "channels_last"]
    training += ["--budget", "16GiB", "--resolution", "0.03", "--points", "1"]
    missing = missing_libraries()
    only = {"SPLITKERN_ONLY": missing[0]} if len(missing) == 1 else {}
    steps = [
        Step("build", [*python, "setup.py", "-q", "build_ext", "--inplace"], 900, only),
        Step("doctor", [*python, "-m", "splitkern", "doctor", "--json"], 90, read=read_doctor),
        Step("tests", [*tests, *parallel, *timeout], 300, {**gpu, "OMP_NUM_THREADS": "1"}, read=read_tests),
        Step("golden", [*python, "-m", "tests.kernel_checks.golden", str(GOLDEN)], 90, read=read_golden),
        Step("memory", [*memory, *timeout], 300, gpu, read=read_tests),
        Step("conv", [*bench, "conv", *which, *extra], 420 * scale, record=True),
        Step("pool", [*bench, "pool", *which, *extra], 150 * scale, record=True),
        Step("copy", [*bench, "copy", *extra], 150, record=True),
        *(
            Step(f"training-{network}", [*bench, *training, "--network", network], 900, record=True)
            for network in ("vgg19", "resnet50")
        ),
        *(_sanitizer_step(tool, python) for tool in ("memcheck", "racecheck")),
    ]
    if options.full:
        large = [*tests, "--large", "-m", "large"]
        steps.append(Step("large", large, 900, gpu, read=read_tests))
    return steps


def missing_libraries() -> list[str]:
    """Native libraries that are not built for this Python, by name."""
    return [name for name, file in LIBRARIES.items() if not (ROOT / "splitkern" / file).exists()]


def _imports(module: str) -> bool:
    """Whether the interpreter that runs the steps has a module; importlib alone would miss a broken one."""
    return subprocess.run([sys.executable, "-c", f"import {module}"], capture_output=True).returncode == 0


def find_sanitizer() -> str | None:
    """compute-sanitizer from the PATH, else from the CUDA toolkit."""
    found = shutil.which("compute-sanitizer")
    if found:
        return found
    folders = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    candidates = [Path(folder) / "bin" / "compute-sanitizer" for folder in folders if folder]
    return next((str(path) for path in candidates if os.access(path, os.X_OK)), None)


def _sanitizer_step(tool: str, python: list[str]) -> Step:
    program = find_sanitizer()
    if program is None:
        return Step(tool, [], 0, missing="compute-sanitizer is neither on the PATH nor in CUDA_HOME/bin")
    # Only this project's kernels: the option has had several names.
    text = subprocess.run([program, "--help"], capture_output=True, text=True).stdout
    option = next((name for name in ("--kernel-name", "--kernel-regex", "--filter") if name in text), None)
    only = [option, "kns=splitkern"] if option else []
    command = [
        program,
        "--tool",
        tool,
        "--error-exitcode",
        "9",
        *only,
        *python,
        "-m",
        "tests.ops_cuda.sanitizer_subset",
    ]
    # Every tensor is an allocation of its own, so that an access past its end leaves it.
    environment = {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    return Step(tool, command, 240, environment, read=read_sanitizer)


# --- running --------------------------------------------------------------------------------------


class Evidence:
    """The file, and the run of steps into it."""

    def __init__(self, path: Path, header: dict[str, Any], *, resume: bool, log: Path | None = None) -> None:
        self.path = path
        self.log = log
        self.data: dict[str, Any] = {"schema": 1, **header, "steps": {}}
        if resume and path.exists():
            before = json.loads(path.read_text())
            differing = [name for name in ("commit", "machine") if before.get(name) != header[name]]
            if differing:
                raise UserError(f"{path} was begun with another {' and '.join(differing)}: run without --resume")
            self.data = before

    def save(self) -> None:
        write_atomically(self.path, self.data)

    def run(self, steps: Sequence[Step], *, seconds: float, tell: Callable[[str], None] = print) -> bool:
        """Runs the steps that have not passed yet; returns whether all have."""
        end = time.monotonic() + seconds
        self.save()
        for step in steps:
            before = self.data["steps"].get(step.name, {})
            if before.get("outcome") == PASSED:
                continue
            left = end - time.monotonic()
            if step.missing is not None:
                entry: dict[str, Any] = {"outcome": UNAVAILABLE, "message": step.missing}
            elif left < 5:
                entry = {**before, "outcome": before.get("outcome", NOT_RUN), "message": "no time was left"}
            else:
                tell(f"==> {step.name}")
                entry = self._run_step(step, before, min(left, step.limit_s))
            self.data["steps"][step.name] = entry
            self.save()
            tell(f"    {step.name}: {entry['outcome']} {_short(entry)}".rstrip())
        return all(self.data["steps"].get(step.name, {}).get("outcome") == PASSED for step in steps)

    def _run_step(self, step: Step, before: dict[str, Any], limit_s: float) -> dict[str, Any]:
        entry: dict[str, Any] = {"outcome": "running", "command": " ".join(step.command[1:])}
        if "record" in before:
            entry["record"] = before["record"]
        self.data["steps"][step.name] = entry
        begin = time.monotonic()
        with tempfile.TemporaryDirectory() as folder:
            log_path, record_path = Path(folder) / "log", Path(folder) / "record.json"
            code, rows = self._attempt(step, entry, log_path, record_path, begin + limit_s)
            log = log_path.read_text(errors="replace")
        entry["seconds"] = round(time.monotonic() - begin, 1)
        entry["exit_code"] = code
        entry["outcome"] = PASSED if code == 0 else TIMED_OUT if code in (None, EXIT_OUT_OF_TIME) else FAILED
        if step.record and rows:
            statuses = [row["status"] for row in rows.values()]
            entry["counts"] = {status: statuses.count(status) for status in dict.fromkeys(statuses)}
            if entry["outcome"] == PASSED and set(statuses) != {"ok"}:
                entry["outcome"] = FAILED
        entry |= step.read(log)
        entry["log_tail"] = log.splitlines()[-TAIL_LINES:] if entry["outcome"] != PASSED else log.splitlines()[-5:]
        if self.log is not None:
            self.log.parent.mkdir(parents=True, exist_ok=True)
            with self.log.open("a") as file:
                file.write(f"==> {step.name}: {entry['outcome']}\n{log}\n")
        return entry

    def _attempt(
        self, step: Step, entry: dict[str, Any], log_path: Path, record_path: Path, end: float
    ) -> tuple[int | None, dict[str, Any]]:
        """Runs the command; a benchmark that ended with its process (a hang, a lost device) goes on in a new one."""
        rows: dict[str, Any] = {}

        def take_over() -> None:
            nonlocal rows
            with contextlib.suppress(OSError, ValueError):
                record = json.loads(record_path.read_text())
                if record != entry.get("record"):
                    rows, entry["record"] = record["rows"], record
                    self.save()

        if not step.record:
            return _process(step.command, step.environment, log_path, end), rows
        if "record" in entry:
            write_atomically(record_path, entry["record"])
            rows = entry["record"]["rows"]
        while True:
            done = len(rows)
            seconds = max(1.0, end - time.monotonic() - 5)
            command = [*step.command, "--save", str(record_path), "--resume", "--seconds", f"{seconds:.0f}"]
            command += ["--commit", self.data["commit"]]
            code = _process(command, step.environment, log_path, end, take_over)
            take_over()
            if code in (0, None, 2, EXIT_OUT_OF_TIME) or len(rows) == done:
                return code, rows


def _process(
    command: Sequence[str],
    environment: dict[str, str],
    log_path: Path,
    end: float,
    on_poll: Callable[[], None] = lambda: None,
) -> int | None:
    """Runs a command with its output added to a log; returns its exit code, None if it was stopped at `end`."""
    path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
    variables = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", **environment}
    polled = time.monotonic()
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            command, cwd=ROOT, env=variables, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
        try:
            while process.poll() is None:
                if time.monotonic() > end:
                    return None
                time.sleep(0.1)
                if time.monotonic() - polled > 2:
                    on_poll()
                    polled = time.monotonic()
            return process.returncode
        finally:
            _stop(process)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Ends the process and all that it started."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(process.pid, number)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(5)


def _short(entry: dict[str, Any]) -> str:
    counts = ", ".join(f"{count} {name}" for name, count in entry.get("counts", {}).items())
    parts = [counts, entry.get("message", ""), f"{entry['seconds']} s" if "seconds" in entry else ""]
    return "  ".join(filter(None, parts))


# --- the command ----------------------------------------------------------------------------------


def probe() -> dict[str, Any]:
    """Device, driver and versions.

    Raises:
        UserError: without a GPU, or without torch.
    """
    process = subprocess.run([sys.executable, "-c", _PROBE], capture_output=True, text=True)
    if process.returncode != 0:
        reason = process.stderr.strip().splitlines()[-1:] or ["no reason given"]
        raise UserError(f"GPU evidence needs a GPU that torch sees: {reason[0]}; nothing was written")
    machine: dict[str, Any] = json.loads(process.stdout)
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        machine["driver"] = (
            subprocess.run(command, capture_output=True, text=True).stdout.split("\n")[0].strip() or None
        )
    except OSError:
        machine["driver"] = None
    machine["cores"] = os.cpu_count()
    return machine


def commit() -> str:
    """The commit of this checkout, "-dirty" if changed, "unknown" where git cannot tell."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    try:
        process = subprocess.run(command, capture_output=True, text=True)
    except OSError:
        return "unknown"
    return process.stdout.strip() if (ROOT / ".git").exists() and process.returncode == 0 else "unknown"


def evidence_path(folder: Path, device: str, identity: str, *, resume: bool) -> Path:
    """The newest file of the device and commit to resume, else the one of today."""
    slug = re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")
    if resume:
        for path in sorted(folder.glob(f"{slug}-*.json"), key=lambda path: path.stat().st_mtime, reverse=True):
            with contextlib.suppress(OSError, ValueError, AttributeError):
                if json.loads(path.read_text()).get("commit") == identity:
                    return path
    return folder / f"{slug}-{datetime.date.today().isoformat()}.json"


def select(steps: Sequence[Step], only: str | None) -> list[Step]:
    """The named steps, in the order named.

    Raises:
        UserError: for a name that no step and no group has.
    """
    if only is None:
        return [step for step in steps if step.name != "build" or missing_libraries()]
    by_name = {step.name: step for step in steps}
    names = [name for word in only.split(",") for name in GROUPS.get(word, (word,))]
    for name in names:
        if name not in by_name:
            raise UserError(f"--only must name some of {', '.join([*by_name, *GROUPS])}, got {name!r}")
    return [by_name[name] for name in names]


def set_limits(steps: Sequence[Step], text: str | None) -> None:
    """Changes time limits, given as name=seconds,...

    Raises:
        UserError: for anything else.
    """
    by_name = {step.name: step for step in steps}
    for part in filter(None, (text or "").split(",")):
        name, _, seconds = part.partition("=")
        if name not in by_name or not seconds.isdigit():
            raise UserError(f"--limits must be STEP=SECONDS,... of {', '.join(by_name)}, got {part!r}")
        by_name[name].limit_s = float(seconds)


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The options."""
    parser = argparse.ArgumentParser(description="Runs everything that needs a GPU; writes one JSON file.")
    parser.add_argument("--full", action="store_true", help="every layer and batch size, and the large tests")
    parser.add_argument("--only", metavar="STEP,...", help="these steps, in this order; groups: bench, sanitizer")
    parser.add_argument("--seconds", type=float, default=float("inf"), metavar="S", help="stop after that time")
    parser.add_argument("--limits", metavar="STEP=S,...", help="other time limits of steps")
    parser.add_argument("--resume", action="store_true", help="continue the newest file of this device and commit")
    parser.add_argument("--commit", metavar="ID", help="what to record where git cannot tell")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results", metavar="FOLDER")
    parser.add_argument("--log", type=Path, metavar="FILE", help="add the steps' whole output to a file")
    parser.add_argument("--jobs", type=int, default=min(8, os.cpu_count() or 1), metavar="N", help="of pytest-xdist")
    parser.add_argument("--budget-ms", type=float, metavar="MS", help="time per benchmarked candidate")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    """Returns 0 if every step passed, 1 if not, 2 for what the user can mend."""
    options = parse(arguments)
    try:
        steps = make_steps(options)
        set_limits(steps, options.limits)
        chosen = select(steps, options.only)
        machine = probe()
        identity = options.commit or commit()
        header = {
            "benchmark": "evidence",
            "device": machine["device"],
            "commit": identity,
            "dirty": identity.endswith("-dirty") if identity != "unknown" else None,
            "full": options.full,
            "machine": machine,
        }
        path = evidence_path(options.out, machine["device"], identity, resume=options.resume)
        evidence = Evidence(path, header, resume=options.resume, log=options.log)
        passed = evidence.run(chosen, seconds=options.seconds, tell=lambda text: print(text, flush=True))
    except UserError as error:
        print(f"gpu_evidence: error: {error}", file=sys.stderr)
        return 2
    print(f"{path}\nsplitkern bench report {path} prints its tables")
    return 0 if passed else 1


if __name__ == "__main__":
    sys.exit(main())
