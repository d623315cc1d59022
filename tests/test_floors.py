"""The architecture, enforced: who may import whom, what stays free of jax, how long files are.

Late imports and those under TYPE_CHECKING count too, so no cycle can hide. Relative imports are
banned by ruff (TID252), so the names found are complete.
"""

import ast
import graphlib
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parent.parent

# Lowest first. A module imports its own floor and lower ones.
FLOORS = [
    ("pallas_kernels",),
    ("valora_jax.errors", "valora_jax.config"),
    ("valora_jax.tensorfiles",),
    ("valora_jax.media",),
    ("valora_jax.lora",),
    ("valora_jax.layers",),
    ("valora_jax.models",),
    ("valora_jax.checkpoint", "valora_jax.convert", "valora_jax.demo"),
    ("valora_jax.engine",),
    ("valora_jax.replay",),
    ("serve", "train"),
    ("valora_jax.cli", "valora_jax.__main__"),
    ("tests", "benchmarks", "examples"),
]
# The order within the engine; modules that are not named here may stand anywhere in it.
ENGINE = [
    ("valora_jax.engine.sampling_params",),
    ("valora_jax.engine.request",),
    ("valora_jax.engine.outputs",),
    ("valora_jax.engine.kv_blocks",),
    ("valora_jax.engine.scheduler",),
    ("valora_jax.engine.costs",),
    ("valora_jax.engine.rounds",),
    ("valora_jax.engine.valora_policy", "valora_jax.engine.policies"),
    ("valora_jax.engine.orchestrator",),
    ("valora_jax.engine.buckets",),
    ("valora_jax.engine.batch",),
    ("valora_jax.engine.step",),
    ("valora_jax.engine.runner",),
    ("valora_jax.engine.engine",),
]
# Policies run in simulated time, in milliseconds: jax in one of these would cost each test seconds.
WITHOUT_JAX = [
    "valora_jax.errors",
    "valora_jax.config",
    "valora_jax.engine.sampling_params",
    "valora_jax.engine.request",
    "valora_jax.engine.outputs",
    "valora_jax.engine.kv_blocks",
    "valora_jax.engine.scheduler",
    "valora_jax.engine.orchestrator",
    "valora_jax.engine.policies",
    "valora_jax.replay.arrivals",
    "valora_jax.replay.driver",
    "valora_jax.replay.points",
    "valora_jax.replay.report",
    "valora_jax.replay.settings",
    "valora_jax.replay.simulation",
    "valora_jax.replay.systems",
]
JAX = {"jax", "jaxlib", "flax", "optax", "orbax"}
MAX_LINES = {"pallas_kernels": 450, "tests": 450}
MAX_LINES_ELSEWHERE = 350

FOLDERS = ["pallas_kernels", "valora_jax", "serve", "train", "tests", "benchmarks", "examples"]
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for folder in FOLDERS
    for path in ROOT.glob(f"{folder}/**/*.py")
}


def imports_of(module: str) -> set[str]:
    """The modules that a file names in its imports; `from package import module` is the module."""
    found = set()
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= (names & FILES.keys()) or {node.module or ""}
    return found


def floor_of(module: str, floors: list[tuple[str, ...]]) -> int | None:
    fits = (i for i, floor in enumerate(floors) if any(is_in(module, name) for name in floor))
    return next(fits, None)


def is_in(module: str, package: str) -> bool:
    return f"{module}.".startswith(f"{package}.")


def reached_from(module: str) -> set[str]:
    """Everything that importing `module` imports, ours and others'."""
    reached, todo = set(), [module]
    while todo:
        new = imports_of(todo.pop()) - reached
        reached |= new
        todo += new & FILES.keys()
    return reached


@pytest.mark.parametrize("floors", [FLOORS, ENGINE], ids=["packages", "engine"])
def test_nothing_imports_upwards(floors):
    pairs = ((m, t) for m in sorted(FILES) for t in sorted(imports_of(m)))
    ranked = ((m, t, floor_of(m, floors), floor_of(t, floors)) for m, t in pairs)
    upward = [f"{m} imports {t}" for m, t, a, b in ranked if None not in (a, b) and b > a]
    assert not upward, "imports that point up a floor:\n  " + "\n  ".join(upward)


def test_every_module_has_a_floor():
    homeless = [m for m in sorted(FILES) if m != "valora_jax" and floor_of(m, FLOORS) is None]
    assert not homeless, "give these a floor in FLOORS:\n  " + "\n  ".join(homeless)


def test_serving_and_training_do_not_import_each_other():
    sides = [("serve", "train"), ("train", "serve")]
    pairs = ((m, t, own, other) for m in FILES for t in imports_of(m) for own, other in sides)
    crossing = [
        f"{m} imports {t}" for m, t, own, other in pairs if is_in(m, own) and is_in(t, other)
    ]
    assert not crossing


def test_there_is_no_cycle():
    graphlib.TopologicalSorter({m: imports_of(m) & FILES.keys() for m in FILES}).prepare()


def test_the_host_side_does_not_import_jax():
    host_side = [module for module in WITHOUT_JAX if module in FILES]
    assert host_side, "none of WITHOUT_JAX exists any more"
    tainted = [m for m in host_side if any(t.split(".")[0] in JAX for t in reached_from(m))]
    assert not tainted, f"these reach jax: {tainted}"


def test_files_stay_short():
    lines_of = {m: len(path.read_text(encoding="utf-8").splitlines()) for m, path in FILES.items()}
    limit_of = {m: MAX_LINES.get(m.split(".")[0], MAX_LINES_ELSEWHERE) for m in FILES}
    too_long = [f"{m}: {n} > {limit_of[m]}" for m, n in lines_of.items() if n > limit_of[m]]
    assert not too_long, "split these files:\n  " + "\n  ".join(too_long)
