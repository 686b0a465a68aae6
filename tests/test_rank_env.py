"""Which rank a process is, from the variables of each launcher."""

from __future__ import annotations

import os
from collections.abc import Iterator
from unittest import mock

import pytest
from two_ranks import LAUNCHER_VARIABLES

from engine.ranks.rank_env import RankEnv, export_rank_env, read_rank_env


@pytest.fixture(autouse=True)
def same_environment() -> Iterator[None]:
    """Restores the variables that `export_rank_env` sets in this process."""
    with mock.patch.dict(os.environ):
        yield


SLURM = {"SLURM_PROCID": "5", "SLURM_NTASKS": "7", "SLURM_LOCALID": "1", "SLURM_NODEID": "1",
         "SLURM_STEP_TASKS_PER_NODE": "4,3", "MASTER_ADDR": "node1"}  # fmt: skip
TORCHRUN = {"RANK": "5", "WORLD_SIZE": "8", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "4", "MASTER_ADDR": "node1"}


def without(variables: dict[str, str], *names: str) -> dict[str, str]:
    return {name: value for name, value in variables.items() if name not in names}


@pytest.mark.parametrize(
    ("variables", "env"),
    [
        ({}, RankEnv(0, 1, 0, 1)),
        (TORCHRUN, RankEnv(5, 8, 1, 4)),
        (without(TORCHRUN, "LOCAL_WORLD_SIZE") | {"LOCAL_SIZE": "2"}, RankEnv(5, 8, 1, 2)),  # deepspeed
        (SLURM, RankEnv(5, 7, 1, 3)),
        (SLURM | {"SLURM_NTASKS": "8", "SLURM_STEP_TASKS_PER_NODE": "4(x2)"}, RankEnv(5, 8, 1, 4)),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE") | {"SLURM_NTASKS_PER_NODE": "6"}, RankEnv(5, 7, 1, 6)),
        (SLURM | TORCHRUN, RankEnv(5, 8, 1, 4)),  # a launcher within a SLURM job
        (without(SLURM, "MASTER_ADDR"), RankEnv(0, 1, 0, 1)),  # a shell within one
        (SLURM | {"SLURM_NTASKS": "1"}, RankEnv(0, 1, 0, 1)),
    ],
)
def test_each_launcher_says_which_rank_a_process_is(variables: dict[str, str], env: RankEnv) -> None:
    with mock.patch.dict(os.environ, variables, clear=True):
        assert read_rank_env() == env


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"RANK": "0"}, "WORLD_SIZE is not set"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 and RANK is not set"),
        (TORCHRUN | {"RANK": "8"}, "RANK is 8 and WORLD_SIZE 8"),
        (TORCHRUN | {"RANK": "-1"}, "RANK is -1"),
        (TORCHRUN | {"RANK": "one"}, "RANK is 'one', which is not a number"),
        (TORCHRUN | {"LOCAL_RANK": "4"}, "LOCAL_RANK is 4 and LOCAL_WORLD_SIZE 4"),
        (TORCHRUN | {"LOCAL_WORLD_SIZE": "16"}, "LOCAL_WORLD_SIZE is 16 and WORLD_SIZE 8"),
        (SLURM | {"SLURM_PROCID": "7"}, "SLURM_PROCID is 7 and SLURM_NTASKS 7"),
        (without(SLURM, "SLURM_LOCALID"), "SLURM_LOCALID is not set"),
        (without(SLURM, "SLURM_STEP_TASKS_PER_NODE"), "SLURM_NTASKS_PER_NODE is not set"),
        (SLURM | {"SLURM_STEP_TASKS_PER_NODE": "four"}, "should read like 4(x2),3"),
        (SLURM | {"SLURM_NODEID": "2"}, "lists 2 nodes"),
    ],
)
def test_variables_that_contradict_each_other_are_refused_by_name(variables: dict[str, str], message: str) -> None:
    with mock.patch.dict(os.environ, variables, clear=True), pytest.raises(ValueError) as refused:
        read_rank_env()
    assert message in str(refused.value)


def test_ranks_of_srun_get_the_variables_that_pytorch_and_deepspeed_read(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in LAUNCHER_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    export_rank_env(read_rank_env())
    exported = {name: os.environ[name] for name in LAUNCHER_VARIABLES if name in os.environ}
    assert exported == {"RANK": "5", "WORLD_SIZE": "7", "LOCAL_RANK": "1", "LOCAL_WORLD_SIZE": "3",
                        "MASTER_ADDR": "node1", "MASTER_PORT": "29500"}  # fmt: skip
