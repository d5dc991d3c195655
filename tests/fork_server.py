"""Python processes that start in no time: one process imports everything slow, and forks for each program to run.

A program is `train.py` with arguments, or `-c` with code. It runs as `__main__` of a process of its own, so that its
exit code, its output, its excepthook and its signals are real. Only what depends on the imports themselves, such as
their order or the environment that libraries read in them, needs a real start.
"""

import gc
import json
import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any

ROOT = Path(__file__).parent.parent
Run = Callable[..., subprocess.CompletedProcess[str]]  # what the fixtures that run command lines return


def run_code(code: str) -> subprocess.CompletedProcess[str]:
    """Run code in a process started anew; it takes no time as long as nothing slow is imported."""
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)


class Forked:
    """A program in a forked process, with the methods of `subprocess.Popen` that are needed.

    Args:
        server: forked it.
        words: the arguments of `train.py`, or `-c` and code.
        cwd: the folder that it starts in.
        environment: all of its environment variables.
    """

    def __init__(self, server: "ForkServer", words: list[str], cwd: Path, environment: dict[str, str]) -> None:
        self._server, self.args = server, words
        self._outputs = [tempfile.NamedTemporaryFile("w+") for _ in range(2)]
        files = [output.name for output in self._outputs]
        self.pid = server.ask({"words": words, "cwd": str(cwd), "environment": environment, "files": files})
        self.returncode: int | None = None

    def poll(self) -> int | None:
        """Return the exit code, or the negative signal that ended it; None while it runs."""
        if self.returncode is None:
            self.returncode = self._server.ask({"pid": self.pid})
        return self.returncode

    def communicate(self, timeout: float) -> tuple[str, str]:
        """Wait for the end, and return what was written to stdout and stderr.

        Args:
            timeout: in seconds.

        Raises:
            TimeoutError: it ran on, and was killed.
        """
        deadline = time.monotonic() + timeout
        while self.poll() is None:
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                raise TimeoutError(f"{self.args} took more than {timeout} s")
            time.sleep(0.005)
        stdout, stderr = (Path(output.name).read_text() for output in self._outputs)
        return stdout, stderr


class ForkServer:
    """Starts the process that has everything imported, and sends it programs to fork for."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, __file__],
            cwd=ROOT,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )

    def ask(self, request: dict[str, Any]) -> Any:
        """Send a request, and return its answer: a new process's id, or whether one has ended, and how."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def run(self, *words: str, cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
        """Run a program to its end, as `subprocess.run` does."""
        process = Forked(self, list(words), cwd, environment)
        stdout, stderr = process.communicate(timeout=300)
        assert process.returncode is not None
        return subprocess.CompletedProcess(words, process.returncode, stdout, stderr)

    def close(self) -> None:
        """End the server."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.close()
        self._process.wait(timeout=60)
        self._process.stdout.close()


# ---------------------------------------------------------------------------------------------- in the server


def _serve(requests: IO[str], answers: IO[str]) -> dict[str, Any] | None:
    """Answer requests; return the one to carry out in a forked process, or None in the server when all is done."""
    for line in requests:
        request = json.loads(line)
        if "pid" in request:
            pid, status = os.waitpid(request["pid"], os.WNOHANG)
            answer = os.waitstatus_to_exitcode(status) if pid else None
        elif (answer := os.fork()) == 0:
            return dict(request)
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
    return None


def _become(request: dict[str, Any]) -> list[str]:
    """Take on the folder, the environment and the outputs of a program, and return its words."""
    os.chdir(request["cwd"])
    os.environ.clear()
    os.environ.update(request["environment"])
    for number, file in enumerate(request["files"], start=1):
        target = os.open(file, os.O_WRONLY | os.O_APPEND)
        os.dup2(target, number)
        os.close(target)
    return list(request["words"])


def main() -> None:
    """Import everything, then fork for each request; in a forked process, run the program."""
    # The streams that programs will write to must be the process's own; the requests get others.
    requests, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    for number in (0, 1):
        os.dup2(os.open(os.devnull, os.O_RDWR), number)
    sys.path[:1] = [str(ROOT), str(ROOT / "tests")]
    import datasets  # noqa: F401
    import matplotlib.pyplot  # noqa: F401
    import transformers.models.gpt2.modeling_gpt2  # noqa: F401

    import train  # noqa: F401

    gc.freeze()  # else every process's collections and its end copy all of this memory
    if (request := _serve(requests, answers)) is None:
        return
    requests.close()
    answers.close()
    words = _become(request)
    sys.argv = ["-c"] if words[0] == "-c" else [str(ROOT / "train.py"), *words]
    sys.orig_argv = [sys.executable, *(words if words[0] == "-c" else sys.argv)]  # with --gpus it is started anew
    # An exception that leaves this reaches the interpreter, as it would without the server.
    if words[0] == "-c":
        exec(compile(words[1], "<string>", "exec"), {"__name__": "__main__"})
    else:
        runpy.run_path(str(ROOT / "train.py"), run_name="__main__")


if __name__ == "__main__":
    main()
