"""Compares the quantized models that two checkouts make: for every checkpoint and scheme, bit by bit.

A change of structure must not change a code or a scale.  For every checkpoint and scheme each checkout quantizes in a process
of its own (``scripts/fingerprint_checkout.py``), on a small calibration sample, and the two are compared layer by layer:
codes, scales, what activations are multiplied with and how they are flattened, float parameters, the outputs of every layer
on random rows, and the model's logits.  Bits depend on the machine, so both checkouts are measured on this one.

Examples:
    python scripts/compare_checkouts.py ../before .                       # the bundled checkpoint, all presets
    python scripts/compare_checkouts.py ../before . --model llama=path/to/checkpoint --text calibration.txt
    python scripts/compare_checkouts.py ../before . --schemes w8a8 flattenquant+int8_head=true --cache ~/.cache/fqjax-bits
    python scripts/compare_checkouts.py ../before . --allow flattenquant  # its codes may change, the others' may not
    python scripts/compare_checkouts.py . . --fresh                       # whether two runs of one checkout agree

``--cache`` keeps results by the checkout's sources, checkpoint, scheme, sample, versions and machine.  The exit code is 0 if
all is identical or allowed to differ, 1 if something differs or fails, 2 for bad usage.
"""

import argparse
import concurrent.futures
import dataclasses
import hashlib
import importlib.metadata
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
from pathlib import Path
from pydoc_data.topics import topics

from checkout_comparison import Comparison, Measured, compare, exit_code, table

FINGERPRINT_VERSION = 1
"""Raised whenever ``fingerprint_checkout.py`` records something else, so that cached results of before are not used."""
FINGERPRINT_SCRIPT = Path(__file__).with_name("fingerprint_checkout.py")
PACKAGES = ("fqjax", "pallas_kernels")
TEXT_CHARACTERS = 200_000
"""Characters of the text that are used, from its beginning."""
HEAD_SCHEME = "w8a8+int8_head=true"
"""Compared after all presets, none of which quantizes the output head."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sample:
    """The text and how much of it is used."""

    text: Path
    samples: int
    window: int
    windows: int


class MeasurementError(Exception):
    """A checkout that cannot quantize a checkpoint, in one line."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Checkout:
    """A checkout, and the directory that keeps its results and compiled programs."""

    root: Path
    kept: Path

    def measure(self, model: Path, scheme: str, sample: Sample) -> Measured:
        """Quantizes a checkpoint, or takes what is kept of doing so before.

        Raises:
          MeasurementError: if it fails, or the sources change meanwhile.
        """
        sources = sources_digest(self.root)
        place = self.kept / f"{model.name}-{scheme}-{_key(sources, tree_digest(model), scheme, sample)[:16]}"
        if not place.is_dir():
            with tempfile.TemporaryDirectory(dir=self.kept) as made:
                out = Path(made, "result")
                out.mkdir()
                self._quantize(model, scheme, sample, out)
                if sources != sources_digest(self.root):
                    raise MeasurementError(f"{self.root} was changed while it was measured")
                out.rename(place)
        figures = json.loads((place / "fingerprint.json").read_text())
        return Measured(arrays=place / "arrays.npz", **figures)

    def _quantize(self, model: Path, scheme: str, sample: Sample, out: Path) -> None:
        task = {"root": self.root, "model": model, "scheme": scheme, "out": out, **dataclasses.asdict(sample)}
        file = out / "task.json"
        file.write_text(json.dumps(task, default=str))
        self._python(str(FINGERPRINT_SCRIPT), str(file), cwd=out)

    def _python(self, *arguments: str, cwd: Path) -> str:
        """Runs Python with the checkout's packages; returns what it prints."""
        environment = os.environ | {
            "PYTHONPATH": str(self.root),
            "JAX_COMPILATION_CACHE_DIR": str(self.kept / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
        }
        command = [sys.executable, "-P", *arguments]
        ended = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True)
        if ended.returncode:
            lines = ended.stderr.strip().splitlines() or [f"exit code {ended.returncode}"]
            raise MeasurementError(f"{self.root}: {lines[-1]}")
        return ended.stdout

    def presets(self) -> list[str]:
        """Names of the checkout's presets."""
        return self._python("-c", "import fqjax; print(*fqjax.PRESETS)", cwd=self.kept).split()


def sources_digest(root: Path) -> str:
    """SHA-256 of a checkout's packages."""
    return tree_digest(*(root / package for package in PACKAGES))


def _key(sources: str, model: str, scheme: str, sample: Sample) -> str:
    """Everything that a result depends on, as one hash."""
    versions = {name: importlib.metadata.version(name) for name in ("jax", "jaxlib", "flax", "numpy", "transformers")}
    names = sorted(name for name in os.environ if name.startswith(("XLA_", "JAX_", "NPROC")) and "CACHE" not in name)
    flags = {name: os.environ[name] for name in names}
    text = hashlib.sha256(sample.text.read_bytes()).hexdigest()
    counts = (sample.samples, sample.window, sample.windows)
    parts = (FINGERPRINT_VERSION, sources, model, scheme, text, counts, versions, sys.version, flags, _machine())
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _machine() -> list[object]:
    cpu = Path("/proc/cpuinfo")
    lines = cpu.read_text().splitlines() if cpu.is_file() else []
    return [platform.machine(), os.cpu_count(), sorted({line for line in lines if line.startswith(("model", "flags"))})]


def tree_digest(*roots: Path) -> str:
    """SHA-256 of the files below some directories, by relative path; compiled Python files left out."""
    found = hashlib.sha256()
    for root in roots:
        for path in sorted(p for p in root.rglob("*") if p.is_file() and "__pycache__" not in p.parts):
            found.update(f"{path.relative_to(root.parent)} {path.stat().st_size} ".encode())
            found.update(path.read_bytes())
    return found.hexdigest()


def label(root: Path) -> str:
    """Commit of a checkout, with ``-dirty`` if it has changes; its path if it is no repository."""
    command = ["git", "-C", str(root), "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"]
    ended = subprocess.run(command, capture_output=True, text=True)
    return ended.stdout.strip() or str(root)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    command = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    command.add_argument("before", type=Path, help="checkout whose bits are right")
    command.add_argument("after", type=Path, help="checkout to be compared with it")
    command.add_argument("--model", action="append", default=[], metavar="NAME=DIR", help="checkpoint; may be repeated")
    command.add_argument("--text", type=Path, help="to calibrate and evaluate on; by default that of Python's help()")
    command.add_argument("--schemes", nargs="+", metavar="SCHEME", help="presets, with +KEY=VALUE for other settings")
    command.add_argument("--allow", nargs="+", default=[], metavar="SCHEME", help="schemes that may differ")
    command.add_argument("--samples", type=int, default=4, help="calibration windows")
    command.add_argument("--window", type=int, default=128, help="tokens in a window")
    command.add_argument("--windows", type=int, default=4, help="windows of the perplexity")
    command.add_argument("--jobs", type=int, default=1, help="processes at a time")
    command.add_argument("--cache", type=Path, help="directory that keeps results and compiled programs")
    command.add_argument("--fresh", action="store_true", help="measure AFTER anew, with programs compiled anew")
    command.add_argument("--json", type=Path, help="file for all differences")
    return command


def refuse_nonsense(command: argparse.ArgumentParser, a: argparse.Namespace) -> None:
    """Ends with exit code 2 if a path is missing or there is nothing to compare."""
    for pair in a.model:
        if not pair.partition("=")[2]:
            command.error(f"--model {pair}: expected NAME=DIR")
    for path in (*models(a).values(), *(root / package for root in (a.before, a.after) for package in PACKAGES)):
        if not path.is_dir():
            command.error(f"{path}: no such directory")
    if a.text and not a.text.is_file():
        command.error(f"{a.text}: no such file")
    if not a.fresh and sources_digest(a.before) == sources_digest(a.after):
        command.error("both checkouts have the same sources; --fresh compares two runs of them")


def models(a: argparse.Namespace) -> dict[str, Path]:
    """Directories of the checkpoints by name."""
    pairs = [pair.partition("=")[::2] for pair in a.model] or [("bundled", a.before / "fqjax/demo/checkpoint")]
    return {name: Path(directory).resolve() for name, directory in pairs}


def compare_all(a: argparse.Namespace, temporary: Path) -> list[Comparison]:
    """Measures and compares every checkpoint and scheme; says on stderr how far it is.

    Raises:
      MeasurementError: if no presets are found, or a scheme that may differ is none of those compared.
    """
    kept, new = (a.cache.resolve() if a.cache else temporary / "kept"), temporary / "new"
    for folder in (kept, new):
        folder.mkdir(parents=True, exist_ok=True)
    before, after = Checkout(root=a.before, kept=kept), Checkout(root=a.after, kept=new if a.fresh else kept)
    schemes = a.schemes or [*before.presets(), HEAD_SCHEME]
    if unknown := set(a.allow) - set(schemes):
        raise MeasurementError(f"--allow {' '.join(sorted(unknown))}: not among the schemes that are compared")
    text = a.text.read_text(encoding="utf-8") if a.text else "\n\n".join(topics[name] for name in sorted(topics))
    (temporary / "text.txt").write_text(text[:TEXT_CHARACTERS], encoding="utf-8")
    sample = Sample(text=temporary / "text.txt", samples=a.samples, window=a.window, windows=a.windows)

    def one(task: tuple[tuple[str, Path], str]) -> Comparison:
        (name, model), scheme = task
        try:
            measured = [checkout.measure(model, scheme, sample) for checkout in (before, after)]
            row = compare(name, scheme, *measured)
        except MeasurementError as error:
            row = Comparison(model=name, scheme=scheme, status="failed", reason=str(error))
        print(f"{name} {scheme}: {row.status} {row.reason}", file=sys.stderr, flush=True)
        return row

    with concurrent.futures.ThreadPoolExecutor(a.jobs) as pool:
        return list(pool.map(one, itertools.product(models(a).items(), schemes)))


def main() -> None:
    """Compares as the command line says, and ends with the exit code."""
    command = parser()
    a = command.parse_args()
    a.before, a.after = a.before.resolve(), a.after.resolve()
    refuse_nonsense(command, a)
    with tempfile.TemporaryDirectory() as temporary:
        try:
            rows = compare_all(a, Path(temporary))
        except MeasurementError as error:
            command.error(str(error))
    commits = [label(root) for root in (a.before, a.after)]
    print(f"{commits[0]} -> {commits[1]}\n\n{table(rows, a.allow)}")
    if a.json:
        document = {"before": commits[0], "after": commits[1], "rows": [dataclasses.asdict(row) for row in rows]}
        a.json.write_text(json.dumps(document, indent=1) + "\n")
    sys.exit(exit_code(rows, a.allow))


if __name__ == "__main__":
    main()
