"""Run tests under every tool of compute-sanitizer, all tools at a time, and say what each finds.

    python sanitize.py [--tools memcheck,racecheck] [--minutes 20] PYTEST-ARGUMENT...

What a tool says, and what pytest says under it, is printed as it comes, after the tool's name. The exit status is 0 if tests passed
and nothing was found under each tool.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from typing import Dict, List

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
#: How a tool ends its report, of one process or of several.
FOUND = re.compile(r"=+ (?:ERROR|RACECHECK) SUMMARY: (\d+)")
#: The status that a tool ends with if it has found something.
FAULTY = 99


class Check:
    """Tests under one tool, for so many seconds at most."""

    def __init__(self, sanitizer: str, tool: str, seconds: float, arguments: List[str]) -> None:
        self.tool = tool
        self.seconds = seconds
        self.found = 0
        self.expired = False
        options = ["--tool", tool, "--target-processes", "all", "--error-exitcode", str(FAULTY)]
        self._process = subprocess.Popen(
            [sanitizer, *options, sys.executable, "-m", "pytest", *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            errors="replace",
            start_new_session=True,
            env={**os.environ, "PYTHONUNBUFFERED": "1"},
        )
        self._printer = threading.Thread(target=self._print)
        self._printer.start()
        self._timer = threading.Timer(seconds, self._expire)
        self._timer.start()

    def _print(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            print(f"{self.tool}: {line.rstrip()}", flush=True)
            summary = FOUND.match(line)
            self.found += int(summary.group(1)) if summary else 0

    def _expire(self) -> None:
        self.expired = True
        self.end()

    def end(self) -> None:
        """End the tool if it still runs, and the tests' processes with it."""
        self._timer.cancel()
        if self._process.poll() is None:
            os.killpg(self._process.pid, signal.SIGKILL)

    def verdict(self) -> str:
        """Wait for the end, and say in words what came out; nothing if all is well."""
        status = self._process.wait()
        self._printer.join()
        if self.expired:
            return f"not finished in {self.seconds:.0f} s"
        if self.found or status == FAULTY:
            return f"found {self.found} faults"
        return "" if status == 0 else f"the tests failed with status {status}"


def main() -> None:
    """Run all checks at the same time and print a line for each."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tools", default=",".join(TOOLS), help="names with commas between them (default: %(default)s)")
    parser.add_argument("--minutes", type=float, default=20.0, help="that each tool may take (default: %(default)s)")
    arguments, tests = parser.parse_known_args()
    sanitizer = shutil.which("compute-sanitizer")
    if sanitizer is None:
        raise SystemExit("compute-sanitizer is not on the path; it comes with the CUDA toolkit")
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(f"ended by signal {number}"))
    checks = [Check(sanitizer, tool, arguments.minutes * 60, tests) for tool in arguments.tools.split(",")]
    try:
        verdicts: Dict[str, str] = {check.tool: check.verdict() for check in checks}
    finally:
        for check in checks:
            check.end()
    for tool, verdict in verdicts.items():
        print(f"{tool}: {verdict or 'nothing found'}")
    raise SystemExit(any(verdicts.values()))


if __name__ == "__main__":
    main()
