"""Creates or completes the virtual environment that the Makefile uses.

Usage: ``python .ci/environment.py .venv EXTRA``. Runs on any Python 3, so that an
interpreter that is too old gets one clear sentence instead of a traceback.
"""

import os
import subprocess
import sys

MINIMUM = (3, 11)
PIP = ("-m", "pip", "install", "--disable-pip-version-check", "--no-input")
OFFLINE_SIGNS = ("No matching distribution", "Connection", "resolution", "timed out")


def main(folder, extra):
    """Installs ``diffmm[extra]`` into ``folder``, or says why it cannot."""
    if sys.version_info < MINIMUM:
        sys.exit(
            "diffmm needs Python {}.{} or newer, but {} is {}.{}: "
            "choose another with 'make PYTHON=python3.12 ...'.".format(
                *MINIMUM, sys.executable, *sys.version_info[:2]
            )
        )
    python = os.path.join(folder, "bin", "python")
    missing = not os.path.exists(python)
    if missing and subprocess.run([sys.executable, "-m", "venv", folder]).returncode:
        sys.exit(
            "The virtual environment could not be created: install Python's venv "
            "module (on Debian: apt install python3-venv)."
        )
    print(f"Installing diffmm[{extra}] into {folder} ...", flush=True)
    log = os.path.join(folder, "install.log")
    with open(log, "w") as output:
        code = subprocess.run(
            [python, *PIP, "--editable", f".[{extra}]"],
            stdout=output,
            stderr=subprocess.STDOUT,
        ).returncode
    if code:
        with open(log) as output:
            text = output.read()
        if any(sign in text for sign in OFFLINE_SIGNS):
            reason = "is the network up, and can pip reach PyPI?"
        else:
            reason = "the last lines of the log name the cause."
        sys.exit(f"Installing diffmm[{extra}] failed (see {log}): {reason}")
    # The test extra contains the examples extra.
    for name in {"test": ("test", "examples")}.get(extra, (extra,)):
        with open(os.path.join(folder, f"{name}.stamp"), "w") as stamp:
            stamp.write("installed\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
