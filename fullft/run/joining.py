"""How ranks meet: they find each other at rank 0's address, compare their options, and form a process group.

On one rank all of this does nothing. Which rank this is says `config/ranks.py`; how they end, `ending.py`.
"""

import atexit
import json
import os
import socket
import sys
import threading
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d
from torch.distributed.distributed_c10d import PrefixStore, Store

from fullft.config.config import Config, to_words
from fullft.config.ranks import Place, find_meeting_point, find_place
from fullft.errors import FullftError, OptionsError
from fullft.hardware import pick_device
from fullft.ranks import wait_for_all
from fullft.run.ending import Ending, watch_ranks

# Ranks of a cluster may start minutes apart; a wrong address should not cost half an hour.
MEETING_SECONDS = 600
# While rank 0 tokenises, or exports, the others wait.
SET_UP_SECONDS = 24 * 3600
_PATIENCE_SECONDS = 10.0  # before rank 0 says for which ranks it waits
_ANSWER_SECONDS = 10.0  # for what answers at the address


def join_ranks(config: Config) -> torch.device:
    """Join the other ranks, if there are any.

    Args:
        config: all ranks must have the same.

    Returns:
        The device of this rank.

    Raises:
        FullftError: the ranks do not meet.
        OptionsError: they have different options, or too few devices.
    """
    place = find_place()
    if place.count == 1:
        return pick_device()
    ending = watch_ranks(place)
    store = _meet(place, ending, min(MEETING_SECONDS, config.ddp_timeout))
    _require_same_options(store, place, config)
    device = pick_device(place)
    excepthook = sys.excepthook  # torch replaces it by one that prefixes every line
    dist.init_process_group(
        "gloo" if device.type == "cpu" else f"cpu:gloo,{device.type}:nccl",
        store=PrefixStore("group", store),
        rank=place.rank,
        world_size=place.count,
        timeout=timedelta(seconds=SET_UP_SECONDS),
        device_id=None if device.type == "cpu" else device,
    )
    sys.excepthook = excepthook
    ending.timeout_seconds = SET_UP_SECONDS
    atexit.register(_leave_ranks, ending)
    return device


def begin_steps(config: Config) -> None:
    """Let a rank that waits for the others give up after `ddp_timeout`, now that all do the same.

    Args:
        config: `ddp_timeout` is read.
    """
    _set_timeout(config.ddp_timeout)


def end_steps() -> None:
    """Let ranks wait as long as it takes: some have work that others have not, such as to export."""
    _set_timeout(SET_UP_SECONDS)


def _set_timeout(seconds: int) -> None:
    if dist.is_initialized():
        for group in _groups():
            distributed_c10d._set_pg_timeout(timedelta(seconds=seconds), group)
        watch_ranks(find_place()).timeout_seconds = seconds


def _groups() -> list[dist.ProcessGroup]:
    """Return all process groups that this rank is in."""
    return list(distributed_c10d._world.pg_map)


def _leave_ranks(ending: Ending) -> None:
    """Leave together at the end of a run, since rank 0 serves the others."""
    try:
        end_steps()
        ending.leave(wait_for_all)
    except BaseException as error:  # Python would print it and exit with 0
        sys.excepthook(type(error), error, error.__traceback__)
    dist.destroy_process_group()


# ---------------------------------------------------------------------------------------------- the meeting


def _meet(place: Place, ending: Ending, seconds: float) -> Store:
    """Return the store that all ranks share, when all have come to it.

    Args:
        place: this process among the ranks.
        ending: is connected to the others as soon as there is a store.
        seconds: how long to wait for them.

    Raises:
        FullftError: the address cannot be reached, or not all ranks come.
    """
    address, port = find_meeting_point()
    deadline = time.monotonic() + seconds
    # torchrun serves a store itself, and keeps it when it starts the ranks anew.
    serves = place.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True"
    if not serves:
        _require_reachable(address, port, seconds)
    run = [os.environ.get(name, "") for name in ("TORCHELASTIC_RUN_ID", "TORCHELASTIC_RESTART_COUNT", "SLURM_JOB_ID")]
    store = PrefixStore(f"fullft/{'/'.join(run)}", _open_store(address, port, place.count, serves))
    connection = store.clone()  # type: ignore[attr-defined]
    ending.connect(PrefixStore("end", connection), socket.gethostname(), _find_failed_collective)
    store.set(f"come/{place.rank}", "")
    missing, says_at = _missing(store, place), time.monotonic() + _PATIENCE_SECONDS
    while missing:
        if time.monotonic() > deadline:
            raise FullftError(
                f"{_listed(missing)} did not come to {address}:{port} within {seconds:.0f} s\n"
                f"see whether they have been started, and whether {place.count} ranks were meant (WORLD_SIZE)"
            )
        if place.rank == 0 and time.monotonic() > says_at:
            print(f"Waiting at {address}:{port} for {_listed(missing)}", flush=True)
            says_at = deadline
        time.sleep(0.02 if place.machines == 1 else 0.5)
        missing = _missing(store, place)
    return store


def _missing(store: Store, place: Place) -> list[int]:
    keys = [f"come/{rank}" for rank in range(place.count)]
    return [] if store.check(keys) else [rank for rank, key in enumerate(keys) if not store.check([key])]


def _listed(ranks: list[int]) -> str:
    """Name ranks, as in "rank 3" or "ranks 3, 5"; of many the first ones."""
    names = ", ".join(map(str, ranks[:8])) + (f" and {len(ranks) - 8} more" if len(ranks) > 8 else "")
    return f"rank{'s' if len(ranks) > 1 else ''} {names}"


def _require_reachable(address: str, port: int, seconds: float) -> None:
    """Wait until something listens at the address. Unlike torch's store this can be interrupted, and says why not."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection((address, port), timeout=_ANSWER_SECONDS).close()
            return
        except OSError as error:
            is_unknown = isinstance(error, socket.gaierror)
            if is_unknown or time.monotonic() > deadline:
                tried = "" if is_unknown else f" within {seconds:.0f} s"
                raise FullftError(
                    f"rank 0 cannot be reached at {address}:{port}{tried} ({error.strerror or error})\n"
                    "see whether MASTER_ADDR and MASTER_PORT name it, whether it runs, and whether a firewall blocks it"
                ) from None
        time.sleep(0.1)


def _open_store(address: str, port: int, count: int, serves: bool) -> Store:
    """Serve the store, or connect to it.

    Raises:
        FullftError: the port is taken, or what listens there is no store.
    """
    opened: list[Store] = []
    failures: list[RuntimeError] = []

    def open_store() -> None:
        timeout = timedelta(seconds=SET_UP_SECONDS)
        try:
            opened.append(dist.TCPStore(address, port, count, serves, timeout, wait_for_workers=False))  # type: ignore[attr-defined]
        except RuntimeError as error:
            failures.append(error)

    # In a thread, since it would wait for ever for a listener that is silent.
    thread = threading.Thread(target=open_store, daemon=True)
    thread.start()
    thread.join(_ANSWER_SECONDS)
    if opened:
        return opened[0]
    if serves:
        raise FullftError(
            f"port {port} of this machine is taken ({_first_line(failures)})\n"
            "end what uses it, or set MASTER_PORT to a free port, the same for all ranks"
        )
    raise FullftError(
        f"what answers at {address}:{port} is not rank 0 ({_first_line(failures)})\n"
        "set MASTER_PORT to a free port of rank 0's machine, the same for all ranks"
    )


def _first_line(failures: list[RuntimeError]) -> str:
    return str(failures[0]).splitlines()[0] if failures else "no answer"


def _require_same_options(store: Store, place: Place, config: Config) -> None:
    """Raise an error if this rank was started with other options than rank 0, or has another torch."""
    words: dict[str, Any] = to_words(config) | {"the version of torch": torch.__version__}
    if place.rank == 0:
        store.set("options", json.dumps(words))
        return
    first = json.loads(store.get("options"))
    own = json.loads(json.dumps(words))
    differing = [
        f"{name} is {own.get(name)!r}, not {first.get(name)!r}"
        for name in own | first
        if own.get(name) != first.get(name)
    ]
    if differing:
        raise OptionsError(
            f"this rank was started differently than rank 0: {'; '.join(differing)}\n"
            "start all ranks with the same command"
        )


def _find_failed_collective() -> str | None:
    """Return "timeout" or "lost" if a collective of NCCL has failed.

    No error reaches Python then: the main thread waits for the device. NCCL's watchdog in torch ends the process, but a
    minute later. Source: torch, ProcessGroupNCCL.cpp, Watchdog::runLoop.
    """
    if not dist.is_initialized():
        return None
    for group in _groups():
        backend = group._get_backend(torch.device("cuda")) if torch.device("cuda") in group._device_types else None
        if backend is not None and hasattr(backend, "get_error"):  # gloo, which serves CUDA too, has none
            error = backend.get_error().name
            if error != "SUCCESS":
                return "timeout" if error == "TIMEOUT" else "lost"
    return None
