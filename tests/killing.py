"""Run scripts of the language model in forked processes that are killed at a rename or after a time.

``python killing.py`` imports the scripts once and then reads requests, one JSON object a line, so that a run takes a second.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Self

SCRIPTS = Path(__file__).parents[1] / "examples" / "nord_lm"
KILLED = -signal.SIGKILL


class Server:
    """A process that forks one process for each run; use it as a context manager."""

    def __enter__(self) -> Self:
        path = os.pathsep.join([str(SCRIPTS), str(SCRIPTS.parents[1]), *sys.path])
        environment = os.environ | {"PYTHONPATH": path, "NORD_SNN_BACKEND": "torch", "OMP_NUM_THREADS": "1"}
        self._process = subprocess.Popen(
            [sys.executable, __file__], env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.stdout.close()
        self._process.wait()

    def run(
        self,
        script: str,
        *arguments: object,
        log: Path,
        point: int | None = None,
        seconds: float | None = None,
        exchange: bool = True,
    ) -> tuple[int, int]:
        """Run a script; return its exit status, negative for a signal, and twice the number of renames.

        Args:
            script: name of the script.
            arguments: its command line.
            log: file for its output.
            point: kill the process at this point: even numbers are before a rename, odd ones after it.
            seconds: kill the process after this time.
            exchange: whether folders can change places in one system call.
        """
        request = {
            "script": script,
            "arguments": [str(argument) for argument in arguments],
            "log": str(log),
            "point": point,
            "seconds": seconds,
            "exchange": exchange,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        status, points = json.loads(self._process.stdout.readline())
        return status, points


def kill_at(point: int | None, exchange: bool) -> Callable[[], int]:
    """Kill this process at a rename; return a function that returns the number of points so far."""
    from nordlm import files

    points = 0

    def reached() -> None:
        nonlocal points
        if points == point:
            os.kill(os.getpid(), signal.SIGKILL)
        points += 1

    def between(rename: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*paths: Any) -> Any:
            reached()
            result = rename(*paths)
            reached()
            return result

        return hooked

    os.rename, os.replace = between(os.rename), between(os.replace)
    files._exchange = between(files._exchange) if exchange else lambda *_: False
    return lambda: points


def _serve() -> None:
    for name in ("train", "evaluate", "convert_original", "nordlm.training.loop", "nordlm.analysis.report"):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        receive, send = os.pipe()
        child = os.fork()
        if not child:
            _run(request, send)
        os.close(send)
        if request["seconds"] is not None:
            time.sleep(request["seconds"])
            os.kill(child, signal.SIGKILL)
        with os.fdopen(receive) as file:
            points = int(file.read() or 0)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        print(json.dumps([status, points]), flush=True)


def _run(request: dict[str, Any], send: int) -> None:
    output = os.open(request["log"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    sys.argv = [request["script"], *request["arguments"]]
    count = kill_at(request["point"], request["exchange"])
    status: int | None = 70
    try:
        status = importlib.import_module(request["script"]).main(request["arguments"])
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    finally:
        sys.stdout.flush()
        os.write(send, str(count()).encode())
        os._exit(status or 0)


if __name__ == "__main__":
    _serve()
