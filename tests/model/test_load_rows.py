"""Several ranks load what one process loads, and none reads more than its share."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from models import bf16_model, make_config
from ranks import run_on_ranks
from sharded_runs import CPU, whole
from torch.distributed.tensor import DTensor
from transformers import PreTrainedModel

import fullft.model.load
from fullft.config.config import Config
from fullft.model import stored as stored_module
from fullft.model.load import load_model, reload_weights
from fullft.storage.tiers import Storage, host_pieces
from fullft.transforms.sharding import apply_sharding

pytestmark = pytest.mark.slow


def load_sharded(config: Config, folder: Path) -> tuple[PreTrainedModel, Storage]:
    storage = Storage(CPU, folder)
    model = load_model(config, str(folder), storage)
    assert all(parameter.is_meta for parameter in model.parameters()) or config.gpus == 1
    assert not any(buffer.is_meta for buffer in model.buffers())
    apply_sharding(model, config, storage)
    return model, storage


def tensors_of(model: PreTrainedModel, storage: Storage) -> dict[str, torch.Tensor]:
    """Return whole weights, buffers and remainders."""
    tensors = {name: whole(parameter) for name, parameter in model.named_parameters()} | dict(model.named_buffers())
    for name, parameter in model.named_parameters():
        if parameter in storage.remainders:
            pieces = [piece.flatten() for piece in host_pieces(storage.remainders[parameter])]
            rows = torch.cat([torch.empty(0, dtype=torch.int16), *pieces]).int()  # gloo has no int16
            if isinstance(parameter, DTensor):
                rows = DTensor.from_local(
                    rows.view(parameter.to_local().shape),
                    parameter.device_mesh,
                    parameter.placements,
                    shape=parameter.shape,
                    stride=parameter.stride(),
                ).full_tensor()
            tensors[f"{name}, remainder"] = rows.flatten()
    return tensors


def counted(folder: Path, work: Callable[[], object]) -> tuple[int, object]:
    """Count the bytes of tensors that are read from files."""
    num_bytes = 0
    read, read_rows = stored_module.StoredTensor.read, stored_module.StoredTensor.read_rows

    def counting(reading: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        def counted_one(*arguments: object) -> torch.Tensor:
            nonlocal num_bytes
            tensor = reading(*arguments)
            num_bytes += tensor.nbytes
            return tensor

        return counted_one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stored_module.StoredTensor, "read", counting(read))
        patch.setattr(stored_module.StoredTensor, "read_rows", counting(read_rows))
        result = work()
    return num_bytes, result


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", ["llama", "qwen2", "gpt2", "mixtral"])
def test_each_rank_reads_its_rows(family: str, dtype: torch.dtype, ranks: int, tmp_path: Path) -> None:
    """Weights, remainders, buffers and configs are those of one process; Mixtral's files must be converted."""
    bf16_model(family).to(dtype).save_pretrained(tmp_path)
    size = sum(file.stat().st_size for file in tmp_path.glob("*.safetensors"))
    offload = "optimizer=disk" if ranks == 3 else "none"
    model, storage = load_sharded(make_config(output_dir=tmp_path, offload="none"), tmp_path)
    expected = tensors_of(model, storage)

    def work() -> tuple[int, dict[str, torch.Tensor], bool, str]:
        config = make_config(output_dir=tmp_path, gpus=ranks, shard="full", offload=offload)
        num_bytes, loaded = counted(tmp_path, lambda: load_sharded(config, tmp_path))
        model, storage = loaded  # type: ignore[misc]
        is_tied = model.get_input_embeddings().weight is model.get_output_embeddings().weight
        return num_bytes, tensors_of(model, storage), is_tied, model.generation_config.to_json_string()

    for num_bytes, found, is_tied, generation in run_on_ranks(ranks, work):
        assert found.keys() == expected.keys()
        assert all(torch.equal(tensor, expected[name]) for name, tensor in found.items())
        assert is_tied == (model.get_input_embeddings().weight is model.get_output_embeddings().weight)
        assert generation == model.generation_config.to_json_string()
        assert num_bytes < 1.1 * size / ranks  # Mixtral's are not read by rows: transformers reads them


def test_the_demo_and_hybrids_load_too(tmp_path: Path) -> None:
    """The demo has random weights. In a hybrid the ranks of each machine have all rows among them."""
    bf16_model("llama").save_pretrained(tmp_path)
    demo = str(fullft.model.load.DEMO_MODEL)
    expected = {
        source: tensors_of(*load_sharded(make_config(output_dir=tmp_path), Path(source)))
        for source in (demo, str(tmp_path))
    }

    def work() -> bool:
        config = make_config(output_dir=tmp_path, gpus=4, shard="gradients", shard_nodes=1)
        found = {source: tensors_of(*load_sharded(config, Path(source))) for source in expected}
        assert config.group.count == 2
        return all(
            torch.equal(tensor, expected[source][name])
            for source, tensors in found.items()
            for name, tensor in tensors.items()
        )

    assert run_on_ranks(4, work, environment={"LOCAL_WORLD_SIZE": "2"}) == [True] * 4


@pytest.mark.parametrize("family", ["qwen2", "mixtral"])
def test_weights_can_be_reloaded_in_place(family: str, tmp_path: Path) -> None:
    bf16_model(family).save_pretrained(tmp_path)

    def work() -> bool:
        config = make_config(output_dir=tmp_path, gpus=2, shard="full")
        model, _ = load_sharded(config, tmp_path)
        expected = {name: whole(parameter) for name, parameter in model.named_parameters()}
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.to_local().zero_()
        reload_weights(config, model, tmp_path)
        return all(torch.equal(whole(parameter), expected[name]) for name, parameter in model.named_parameters())

    assert run_on_ranks(2, work) == [True, True]
