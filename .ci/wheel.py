"""Builds the wheel, installs it elsewhere and imports it from another directory."""

import glob
import os
import subprocess
import sys
import tempfile

PIP = ("-m", "pip", "install", "--quiet", "--no-deps")
CHECK = """
import sys
import diffmm, diffmm.data, diffmm.diffusion, diffmm.models, diffmm.samplers
import diffmm.optim, diffmm.parameterisation, diffmm.policies, diffmm.training
import importlib.resources
import diffmm_kernels.sigmoid_attention as kernels
tables = importlib.resources.files(kernels) / "tables"
assert (tables / "mosaic_gpu_forward.json").is_file(), "tables are missing"
assert "site" in diffmm.__file__, diffmm.__file__
print("wheel of diffmm", diffmm.__version__, "imports from", diffmm.__file__)
"""


def main():
    """Fails if the wheel cannot be built or imported."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, "-m", "build", "--wheel", "--outdir", folder], check=True
        )
        (wheel,) = glob.glob(os.path.join(folder, "*.whl"))
        site = os.path.join(folder, "site")
        subprocess.run(
            [sys.executable, *PIP, "--target", site, wheel],
            check=True,
        )
        # -P and the first place on the path: the wheel, never the checkout.
        environment = {**os.environ, "PYTHONPATH": site}
        subprocess.run(
            [sys.executable, "-P", "-c", CHECK], check=True, cwd=folder, env=environment
        )


if __name__ == "__main__":
    main()
