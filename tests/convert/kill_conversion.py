"""Kills conversions at random points and takes them up again; run by test_convert_faults.py in a process of its own.

    python kill_conversion.py SOURCE TEXT FOLDER POINTS

Every conversion runs in a process that is forked after everything has been imported and before JAX starts.  There it counts
what it does to files under its target's name, and kills itself, by SIGKILL, right before a number drawn at random.  It is
taken up again, and killed again, until it gets to its end.
"""

import json
import os
import random
import signal
import sys
from pathlib import Path

from fqjax.checkpoint.architecture import read_architecture
from fqjax.checkpoint.tokenizer import load_tokenizer
from fqjax.cli import main as cli
from fqjax.convert.staging import completion_file
from fqjax.data.text import encode

OPTIONS = ("--scheme", "flattenquant-hopper", "--samples", "2", "--window", "32", "--ignore", "gate_up|qkv")
"""With GPTQ and a choice of bits, so that there are all passes; two layers a block, which saves compiling for the rest."""

EVENTS = ("open", "os.rename", "os.mkdir", "os.remove", "os.rmdir", "shutil.rmtree", "os.truncate")


def convert(out: Path, last: int | None, counted: Path, *options: str) -> int:
    """Forks a conversion that dies before its event number ``last``; returns its exit code, negative for a signal."""
    child = os.fork()
    if child:
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    seen = 0

    def count(event: str, args: tuple) -> None:
        nonlocal seen
        if event in EVENTS and str(args[0]).startswith(str(out)):
            seen += 1
            if seen == last:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)
    sys.stdout = open(os.devnull, "w")
    code = cli.main(["convert", SOURCE, str(out), "--calibration", TEXT, *OPTIONS, *options])
    counted.write_text(str(seen))
    os._exit(code)


SOURCE, TEXT, FOLDER, POINTS = sys.argv[1], sys.argv[2], Path(sys.argv[3]), int(sys.argv[4])


def main() -> None:
    # What is imported lazily, and takes longer than such a conversion does.
    read_architecture(Path(SOURCE))
    encode(load_tokenizer(SOURCE), "text")
    counted, whole, rng = FOLDER / "counted", FOLDER / "whole", random.Random(0)
    assert convert(whole, None, counted) == 0
    total, kills, chains = int(counted.read_text()), [], 0
    while len(kills) < POINTS:
        out, options, code = FOLDER / f"killed-{chains}", (), -signal.SIGKILL
        while code == -signal.SIGKILL:
            last = rng.randint(1, total) if len(kills) < POINTS else None
            code = convert(out, last, counted, *options)
            if code == -signal.SIGKILL:
                published = completion_file(out)
                kills.append({"event": last, "existed": out.exists(), "published": published.exists()})
                options = ("--resume",)
        assert code == 0, code
        chains += 1
    print(json.dumps({"total": total, "kills": kills, "chains": chains}))


main()
