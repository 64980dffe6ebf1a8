"""The rules of the house: who may import whom, and what an import may load."""

import ast
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parent.parent
PACKAGES = ("diffmm", "diffmm_kernels")

# Rooms of diffmm that a room may import, beside itself, `typing`, `_tree`, `version`.
MAY_IMPORT = {
    "data": set(),
    "diffusion": set(),
    "models": set(),
    "optim": set(),
    "parameterisation": set(),
    "policies": {"samplers"},
    "samplers": {"diffusion"},
    "training": set(),
    "typing": set(),
    "_tree": set(),
    "version": set(),
}
GROUND = {"typing", "_tree", "version"}
HEAVY = ("tensorflow", "tensorflow_datasets", "matplotlib", "sklearn", "librosa")
# Third-party packages that only the named rooms may import at module level.
RESERVED = {
    "flax": {"models"},
    "optax": {"optim", "policies", "training"},
    "orbax": {"training"},
    "grain": {"data", "training"},
}


def modules():
    for package in PACKAGES:
        for path in sorted((ROOT / package).rglob("*.py")):
            yield path, ast.parse(path.read_text(encoding="utf-8"))


def room_of(name):
    parts = name.split(".")
    return parts[1] if len(parts) > 1 else ""


def imported(tree, top_level_only=False):
    nodes = tree.body if top_level_only else ast.walk(tree)
    for node in nodes:
        if isinstance(node, ast.Import):
            yield from ((alias.name, None) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            yield from ((node.module, alias.name) for alias in node.names)


def test_imports_follow_the_table():
    for path, tree in modules():
        relative = path.relative_to(ROOT).with_suffix("")
        here = room_of(".".join(relative.parts))
        for module, name in imported(tree):
            if relative.parts[0] == "diffmm_kernels":
                assert not module.startswith(("diffmm.", "flax")), (relative, module)
            if not module.startswith("diffmm.") or here in ("", "__init__"):
                continue
            target = room_of(module)
            if target == here:
                continue
            allowed = MAY_IMPORT[here] | GROUND
            assert target in allowed, f"{relative}: {here} may not import {target}"
            parts = [*module.split(".")[2:], name or ""]
            private = [p for p in parts if p.startswith("_") and p[:2] != "__"]
            assert not private, f"{relative} imports the private {private}"


def test_third_party_packages_stay_in_their_rooms():
    for path, tree in modules():
        here = room_of(".".join(path.relative_to(ROOT).with_suffix("").parts))
        for module, _ in imported(tree, top_level_only=True):
            top = module.split(".")[0]
            assert top not in HEAVY, f"{path}: {top} belongs inside a function"
            assert here in RESERVED.get(top, {here}), f"{path}: {top} not for {here}"


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import diffmm", ("jax", "flax", *HEAVY)),
        ("import diffmm.diffusion, diffmm.samplers", ("flax", "grain", *HEAVY)),
        ("import diffmm.data", ("flax", *HEAVY)),
        ("import diffmm.parameterisation", ("flax", "optax", "orbax", "grain", *HEAVY)),
        ("import diffmm.optim", ("flax", "orbax", "grain", *HEAVY)),
        ("import diffmm.policies", ("flax", "orbax", "grain", *HEAVY)),
        ("import diffmm.models, diffmm.training", HEAVY),
    ],
)
def test_an_import_loads_little_and_starts_no_backend(statement, absent):
    check = (
        f"{statement}\nimport sys\n"
        f"loaded = [m for m in {absent!r} if m in sys.modules]\n"
        "assert not loaded, loaded\n"
        "bridge = sys.modules.get('jax._src.xla_bridge')\n"
        "assert bridge is None or not bridge._backends, 'a backend was started'\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", check], capture_output=True, text=True, cwd=ROOT
    )
    assert done.returncode == 0, done.stderr[-2000:]
