"""Run scripts of the language model in forked processes, which can be killed before or after a chosen rename, or after a time.

``python killing.py`` imports the scripts once and then forks for each request, a line of JSON, so that a run takes a second.
"""

import importlib
import json
import os
import signal
import socket
import subprocess
import sys
import time
import traceback
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
        processes: int = 1,
        fault: str | None = None,
        lost: str | None = None,
    ) -> tuple[int, int]:
        """Run a script; return its exit status (minus the signal if killed) and the number of points that it passed.

        The points are before and after each rename. AssertionError if the exit statuses of the processes differ.

        Args:
            script: name of the script.
            arguments: its command line.
            log: file for its output.
            point: kill the process at this point, counted from 0: even points are before a rename, odd points after it.
            seconds: kill the process after this time, in seconds.
            exchange: whether the file system can exchange two folders in one system call.
            processes: number of processes of one distributed training.
            fault: name of a function of this module that is called first, with the rank of the process, or an environment
                variable as ``NAME=VALUE``.
            lost: ``"disk"``: standard output is a full disk; ``"pipe"``: a pipe without a reader. ``log`` has standard error.
        """
        request = {
            "script": script,
            "arguments": [str(argument) for argument in arguments],
            "log": str(log),
            "point": point,
            "seconds": seconds,
            "exchange": exchange,
            "processes": processes,
            "fault": fault,
            "lost": lost,
        }
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        statuses, points = json.loads(self._process.stdout.readline())
        assert len(set(statuses)) == 1, statuses
        return statuses[0], points


def kill_at(point: int | None, exchange: bool) -> Callable[[], int]:
    """Kill this process at a point of :meth:`Server.run`; return a function that returns the number of points passed so far."""
    from nordlm import files

    points = 0

    def pass_point() -> None:
        nonlocal points
        if points == point:
            os.kill(os.getpid(), signal.SIGKILL)
        points += 1

    def with_points(rename: Callable[..., Any]) -> Callable[..., Any]:
        def hooked(*paths: Any) -> Any:
            pass_point()
            result = rename(*paths)
            pass_point()
            return result

        return hooked

    os.rename, os.replace = with_points(os.rename), with_points(os.replace)
    files._exchange = with_points(files._exchange) if exchange else lambda *_: False
    return lambda: points


def full_disk_in_process_1(rank: int) -> None:
    """Make the first checkpoint of the process of rank 1 fail."""
    from accelerate import Accelerator

    save_state, calls = Accelerator.save_state, []

    def full(self: Accelerator, folder: str, **more: Any) -> None:
        calls.append(folder)
        save_state(self, folder, **more)
        if rank == 1 and len(calls) == 1:
            raise OSError(28, "No space left on device")

    Accelerator.save_state = full


def nan_weight(rank: int) -> None:
    """Make a weight NaN after the fourth training step."""
    import torch
    from nordlm.training import loop

    take_step, calls = loop.take_step, []

    def diverge(accelerator: Any, prepared: Any, *rest: Any) -> Any:
        calls.append(0)
        outcome = take_step(accelerator, prepared, *rest)
        if len(calls) == 4:
            torch.nn.init.constant_(accelerator.unwrap_model(prepared.model).norm.weight, torch.nan)
        return outcome

    loop.take_step = diverge


def error_in_process_1(rank: int) -> None:
    """Raise an error in the fourth training step of the second process."""
    from nordlm.training import loop

    take_step, calls = loop.take_step, []

    def fail(*arguments: Any) -> Any:
        calls.append(0)
        if rank == 1 and len(calls) == 4:
            raise RuntimeError("out of memory in this process alone")
        return take_step(*arguments)

    loop.take_step = fail


def infinite_held_out_loss(rank: int) -> None:
    """Make the final loss on held-out text infinite."""
    from nordlm.training import loop

    loop.held_out_loss = lambda *_: float("inf")


def endless_input(rank: int) -> None:
    """Make standard input endless."""
    os.dup2(os.open("/dev/zero", os.O_RDONLY), 0)


def stream(rank: int) -> None:
    """Stream the text instead of reading it into memory."""
    from nordlm.data import sources

    sources.IN_MEMORY_BYTES = 0


def broken_stream(rank: int) -> None:
    """Stream the text, with an error after 40 sequences."""
    from nordlm.data import corpus
    from nordlm.errors import DataError

    stream(rank)
    pack = corpus.pack

    def pack_40(encoded: Any, block_size: int) -> Any:
        for n, block in enumerate(pack(encoded, block_size)):
            if n == 40:
                raise DataError("the stream broke off")
            yield block

    corpus.pack = pack_40


def _serve() -> None:
    """Import the scripts, and fork processes that run a script for each request on standard input."""
    for name in (
        "train",
        "evaluate",
        "generate",
        "energy",
        "convert_original",
        "nordlm.training.loop",
        "nordlm.analysis.report",
    ):
        importlib.import_module(name)
    for line in sys.stdin:
        request = json.loads(line)
        receive, send = os.pipe()
        Path(request["log"]).write_text("")
        children, port = [], _free_port()
        for rank in range(request["processes"]):
            children.append(os.fork())
            if not children[-1]:
                _run(request, rank, port, send)
        os.close(send)
        if request["seconds"] is not None:
            time.sleep(request["seconds"])
            for child in children:
                os.kill(child, signal.SIGKILL)
        with os.fdopen(receive) as file:
            points = int(file.read() or 0)
        statuses = [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]
        print(json.dumps([statuses, points]), flush=True)


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("localhost", 0))
        return free.getsockname()[1]


def _pipe_without_reader() -> int:
    receive, send = os.pipe()
    os.close(receive)
    return send


def _run(request: dict[str, Any], rank: int, port: int, send: int) -> None:
    """Run the script of a request in this process, write the number of points to the pipe ``send``, and end the process."""
    output = os.open(request["log"], os.O_WRONLY | os.O_APPEND)
    for descriptor in (1, 2):
        os.dup2(output, descriptor)
    if request["lost"] is not None:
        os.dup2(os.open("/dev/full", os.O_WRONLY) if request["lost"] == "disk" else _pipe_without_reader(), 1)
    if request["processes"] > 1:
        size = {"WORLD_SIZE": request["processes"], "LOCAL_WORLD_SIZE": request["processes"]}
        address = {"MASTER_ADDR": "localhost", "MASTER_PORT": port, "ACCELERATE_USE_CPU": "true"}
        os.environ |= {k: str(v) for k, v in ({"RANK": rank, "LOCAL_RANK": rank} | size | address).items()}
    from nordlm.script import run_script

    sys.argv = [request["script"], *request["arguments"]]
    name, is_variable, value = (request["fault"] or "").partition("=")
    if is_variable:
        os.environ[name] = value
    elif name:
        globals()[name](rank)
    count = kill_at(request["point"], request["exchange"])
    status: int | str | None = 70
    try:
        main = importlib.import_module(request["script"]).main
        status = run_script(lambda: main(request["arguments"]), keep_running=request["script"] == "train")
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else 1
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stderr.flush()
        if rank == 0:
            os.write(send, str(count()).encode())
        os._exit(status or 0)


if __name__ == "__main__":
    _serve()
