"""Runs the tests of kernels on a Python and a JAX that can interpret all of them.

Pallas' interpreter for Hopper kernels needs JAX 0.11.2, which needs Python 3.12. Where
such an interpreter is found it gets an environment of its own; otherwise the tests
are skipped, with the reason.

Usage: ``python .ci/kernels.py FOLDER [pytest arguments]``; ``KERNELS_PYTHON`` names the
interpreter.
"""

import glob
import os
import shutil
import subprocess
import sys

MINIMUM = (3, 12)
REQUIREMENTS = ("jax>=0.11.2,<0.12", "absl-py", "pytest", "pytest-xdist")
PIP = ("-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input")


def _candidates():
    if "KERNELS_PYTHON" in os.environ:
        yield os.environ["KERNELS_PYTHON"]
        return
    yield sys.executable
    for minor in (12, 13, 14):
        yield shutil.which(f"python3.{minor}")
        pattern = f"~/.pyenv/versions/3.{minor}.*/bin/python"
        yield from sorted(glob.glob(os.path.expanduser(pattern)))


def _version(python):
    """(3, 12) of an interpreter, or None if it does not run."""
    code = "import sys; print(*sys.version_info[:2])"
    try:
        result = subprocess.run(
            [python, "-c", code], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return tuple(map(int, result.stdout.split()))


def find_python():
    """The first interpreter that is new enough, or None."""
    for python in _candidates():
        version = _version(python) if python else None
        if version is not None and version >= MINIMUM:
            return python
    return None


def main(folder, *arguments):
    """Creates the environment if need be and runs the tests."""
    python = os.path.join(folder, "bin", "python")
    if not os.path.exists(python):
        found = find_python()
        if found is None:
            wanted = ".".join(map(str, MINIMUM))
            print(
                f"Kernel tests skipped: interpreting Hopper kernels needs JAX 0.11.2, "
                f"hence Python {wanted} or newer, and none was found "
                "(KERNELS_PYTHON=/path/to/python names one)."
            )
            return
        subprocess.run([found, "-m", "venv", folder], check=True)
    stamp = os.path.join(folder, "kernels.stamp")
    if not os.path.exists(stamp):
        if subprocess.run([python, *PIP, *REQUIREMENTS]).returncode:
            sys.exit(f"Installing {' '.join(REQUIREMENTS)} failed: is PyPI reachable?")
        with open(stamp, "w") as file:
            file.write("installed\n")
    environment = {**os.environ, "PYTHONPATH": os.getcwd(), "JAX_PLATFORMS": "cpu"}
    command = [
        python,
        "-m",
        "pytest",
        "-n",
        "2",
        *glob.glob("tests/kernels/test_mosaic_gpu*.py"),
        *arguments,
    ]
    sys.exit(subprocess.run(command, env=environment).returncode)


if __name__ == "__main__":
    main(*sys.argv[1:])
