"""Makes or completes the project's own Python environment. Called by the Makefile with any Python 3.11 or 3.12.

    python set_up_environment.py FOLDER REQUIREMENT...

Installs the requirements, plus what pyproject.toml names for the extras given with --extra and for building
(--build-requirements). Works on a new folder, on a complete one (quick), and after an interruption: a folder that was
left half installed is made anew, because pip would take half-copied packages for installed ones.
"""

import argparse
import fcntl
import os
import shlex
import shutil
import subprocess
import sys
import time
from pathlib import Path

if sys.version_info[:2] not in ((3, 11), (3, 12)):
    sys.exit(f"splitkern needs Python 3.11 or 3.12, got {sys.version.split()[0]}: make PYTHON=/path/to/python3.12")

import tomllib

ROOT = Path(__file__).parent.parent.resolve()


def say(text: str) -> None:
    print(f"==> {text}", flush=True)


def requirements_from_project(extras: list[str], build: bool) -> list[str]:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    found: list[str] = []
    if build:
        found += project["build-system"]["requires"]
    found += project["project"]["dependencies"] if extras or build else []
    for extra in extras:
        found += project["project"]["optional-dependencies"][extra]
    return found


def is_usable(folder: Path) -> bool:
    """Tells whether the folder's Python runs, is a supported one, and has pip."""
    check = "import pip, sys; sys.exit(sys.version_info[:2] not in ((3, 11), (3, 12)))"
    python = folder / "bin" / "python"
    return python.exists() and subprocess.run([python, "-c", check], capture_output=True).returncode == 0


def set_up(folder: Path, requirements: list[str]) -> None:
    installing = folder / ".installing"  # there from the first change to the last
    if installing.exists():
        say(f"{folder.name} was left half installed; making it anew")
        shutil.rmtree(folder)
    elif folder.exists() and not is_usable(folder):
        say(f"{folder.name} has no working Python 3.11 or 3.12; making it anew")
        shutil.rmtree(folder)
    is_new = not folder.exists()
    folder.mkdir(exist_ok=True)
    installing.touch()
    if is_new:
        say(f"making {folder.name} with Python {sys.version.split()[0]}")
        run([sys.executable, "-m", "venv", str(folder)])
        say("installing packages, torch among them: gigabytes, so this can take minutes")
    started = time.monotonic()
    try:
        run([str(folder / "bin" / "python"), "-m", "pip", "install", *QUIET, *requirements])
    except subprocess.CalledProcessError as error:
        if error.returncode > 0:  # pip itself gave up, and has undone what it had begun
            installing.unlink()
        raise
    installing.unlink()
    say(f"{folder.name} is set up ({time.monotonic() - started:.0f} s)")


# Errors are shown, warnings are not: a mirror that is configured but absent would fill the screen with them.
QUIET = ["-qq", "--disable-pip-version-check", "--no-input", "--progress-bar", "off"]


def run(command: list[str]) -> None:
    # Nothing of another environment, and nothing of the user's, may leak in.
    environment = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONHOME")}
    environment["PYTHONNOUSERSITE"] = "1"
    subprocess.run(command, env=environment, check=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("requirements", nargs="*")
    parser.add_argument("--extra", action="append", default=[])
    parser.add_argument("--build-requirements", action="store_true")
    options = parser.parse_args()
    folder = options.folder.absolute()
    requirements = [*options.requirements, *requirements_from_project(options.extra, options.build_requirements)]
    with open(folder.with_name(folder.name + ".lock"), "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # two makes at once: the second waits, then finds everything there
        try:
            set_up(folder, requirements)
        except subprocess.CalledProcessError as error:
            sys.exit(f"set-up failed: {shlex.join(error.cmd)}")


if __name__ == "__main__":
    main()
