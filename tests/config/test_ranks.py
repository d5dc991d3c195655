"""Which rank a process is, as torchrun or Slurm say, and where rank 0 is to be found."""

import pytest

from fullft.config.ranks import Place, find_meeting_point, find_place, first_host
from fullft.errors import OptionsError

TORCHRUN = {"RANK": "9", "WORLD_SIZE": "16", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "8"}
SLURM = {
    "SLURM_PROCID": "9",
    "SLURM_STEP_NUM_TASKS": "16",
    "SLURM_LOCALID": "1",
    "SLURM_STEP_TASKS_PER_NODE": "8(x2)",
    "SLURM_NODEID": "1",
}
NAMES = (*TORCHRUN, *SLURM, "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_ID", "SLURM_STEP_ID")


@pytest.fixture
def environment(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    for name in (*NAMES, "SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@pytest.mark.parametrize(
    ("variables", "place"),
    [
        ({}, Place()),
        (TORCHRUN, Place(9, 16, 1, 8)),
        (SLURM, Place(9, 16, 1, 8)),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "12,4"}, Place(9, 16, 1, 4)),
        (SLURM | TORCHRUN | {"RANK": "3"}, Place(3, 16, 1, 8)),
        (SLURM | {"RANK": "9", "WORLD_SIZE": "16"}, Place(9, 16, 1, 8)),  # as many scripts set them
        (SLURM | {"RANK": "3", "WORLD_SIZE": "4"}, Place(3, 4, 0, 1)),  # not of that step
        ({"RANK": "0", "WORLD_SIZE": "1"}, Place()),
        ({"SLURM_PROCID": "0", "SLURM_JOB_ID": "5"}, Place()),  # a batch script
        ({"RANK": "", "WORLD_SIZE": "two"}, Place()),
    ],
)
def test_place_is_what_the_starter_says(
    variables: dict[str, str], place: Place, environment: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        environment.setenv(name, value)
    assert find_place() == place


def test_machines_are_counted() -> None:
    assert [Place(0, count, 0, 8).machines for count in (8, 16, 17)] == [1, 2, 3]


@pytest.mark.parametrize(
    ("nodes", "host"),
    [
        ("node[01-04,07],x3", "node01"),
        ("x3,node[1-2]", "x3"),
        ("rack[2-3]-n[08,10]", "rack2-n08"),
        ("gpu-a[7]", "gpu-a7"),
        ("one.example", "one.example"),
    ],
)
def test_first_host_of_a_list(nodes: str, host: str) -> None:
    assert first_host(nodes) == host


def test_slurm_says_where_to_meet(environment: pytest.MonkeyPatch) -> None:
    environment.setenv("SLURM_JOB_ID", "123456")
    environment.setenv("SLURM_JOB_NODELIST", "batch[1-9]")
    environment.setenv("SLURM_STEP_NODELIST", "node[3-4]")
    address, port = find_meeting_point()
    assert address == "node3" and 10_000 <= port < 30_000
    environment.setenv("SLURM_STEP_ID", "1")
    assert find_meeting_point() == ("node3", port + 1)
    environment.setenv("MASTER_ADDR", "other")
    environment.setenv("MASTER_PORT", "999")
    assert find_meeting_point() == ("other", 999)


@pytest.mark.parametrize("port", ["", "x", "0", "65536", "-1"])
def test_impossible_meeting_point_is_refused(port: str, environment: pytest.MonkeyPatch) -> None:
    environment.setenv("MASTER_ADDR", "here")
    environment.setenv("MASTER_PORT", port)
    with pytest.raises(OptionsError, match="MASTER_PORT"):
        find_meeting_point()
