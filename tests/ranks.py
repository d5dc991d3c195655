"""Several ranks on this machine, over gloo: forked from this process, where everything slow has been imported."""

import faulthandler
import os
import pickle
import signal
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.fsdp  # so that no rank imports it

_GRACE = 5.0  # seconds that ranks have to end after one has failed: what they say is a consequence, or nothing
_FRAMES = 12  # lines of the stack of a rank that hangs


def run_on_ranks(
    count: int,
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 60.0,
    environment: Mapping[str, str] | None = None,
) -> list[Any]:
    """Call a function on each of several ranks, with all that this process has in memory.

    Args:
        count: of the ranks.
        function: anything, a closure too; what it returns, or raises, is pickled.
        arguments: the same for every rank.
        seconds: that all of them may take; then the stacks of those that are left are printed, and they are killed.
        environment: variables for every rank, beside those that say which one it is.

    Returns:
        Each rank's result, in their order.

    Raises:
        Exception: whatever the first rank to fail has raised.
        TimeoutError: a rank was still running.
    """
    with TemporaryDirectory(prefix="fullft-ranks-") as name:
        folder = Path(name)

        def work() -> Any:
            os.environ.update(environment or {})
            os.environ["LOCAL_RANK"] = str(int(os.environ["RANK"]) % int(os.environ["LOCAL_WORLD_SIZE"]))
            return function(*arguments)

        running = {_fork(rank, count, folder, work, seconds): rank for rank in range(count)}
        try:
            _wait(running, folder, seconds)
        finally:
            for pid in running:
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
        return [pickle.loads((folder / f"result-{rank}").read_bytes()) for rank in range(count)]


def _wait(running: dict[int, int], folder: Path, seconds: float) -> None:
    """Wait until all processes have ended well; those that did leave the dict."""
    deadline, failed = time.monotonic() + seconds, dict[int, int]()
    while running and time.monotonic() < deadline:
        for pid, rank in list(running.items()):
            ended, status = os.waitpid(pid, os.WNOHANG)
            if ended:
                del running[pid]
            if ended and status:
                failed[rank] = os.waitstatus_to_exitcode(status)
                deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.005)
    errors = sorted(folder.glob("error-*"), key=lambda file: file.stat().st_mtime_ns)
    if errors:
        raise pickle.loads(errors[0].read_bytes())
    if failed:
        raise RuntimeError(f"ranks ended without an exception, with these codes: {failed}")
    if running:
        stacks = [
            "\n".join((folder / f"stacks-{rank}").read_text().splitlines()[:_FRAMES]) for rank in running.values()
        ]
        raise TimeoutError("\n".join([f"after {seconds} s these ranks still run: {list(running.values())}", *stacks]))


def _fork(rank: int, count: int, folder: Path, work: Callable[[], Any], seconds: float) -> int:
    sys.stdout.flush()  # or the rank would write it once more
    if pid := os.fork():
        return pid
    code = 1
    try:
        with (folder / f"stacks-{rank}").open("w") as stacks:
            faulthandler.dump_traceback_later(0.9 * seconds, file=stacks)
            result = pickle.dumps(_be(rank, count, folder, work))
            faulthandler.cancel_dump_traceback_later()
        (folder / f"result-{rank}").write_bytes(result)
        code = 0
    except BaseException as error:
        (folder / f"error-{rank}").write_bytes(_pickled(error))
    finally:
        sys.stdout.flush()
        os._exit(code)  # past the handlers of the test's process


def _be(rank: int, count: int, folder: Path, work: Callable[[], Any]) -> Any:
    """Be a rank: as whoever starts ranks says by the environment, with its group of processes."""
    place = {"RANK": rank, "WORLD_SIZE": count, "LOCAL_RANK": rank, "LOCAL_WORLD_SIZE": count}
    os.environ.update({name: str(value) for name, value in place.items()})
    os.environ["GLOO_SOCKET_IFNAME"] = "lo" if sys.platform == "linux" else "lo0"
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=count, timeout=timedelta(seconds=30)
    )
    result = work()
    dist.destroy_process_group()
    return result


def _pickled(error: BaseException) -> bytes:
    try:
        pickle.loads(content := pickle.dumps(error))
        return content
    except Exception:
        return pickle.dumps(RuntimeError(f"{type(error).__name__}: {error}"))
