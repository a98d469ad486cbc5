"""Running Python code in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys


def run_python(
    code: str, *arguments: object, timeout: float = 120, **environment: str
) -> subprocess.CompletedProcess[str]:
    """Run `code` with sys.argv[1:] = arguments; the caller checks the return code."""
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )


def check_python(code: str, *arguments: object, timeout: float = 120, **environment: str) -> str:
    """Run `code`, require success, and return what it printed."""
    done = run_python(code, *arguments, timeout=timeout, **environment)
    assert done.returncode == 0, done.stderr
    return done.stdout
