import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import tiny_batch, tiny_config
from MMCLIP.modeling_mmclip import MMCLIPForPreTraining

from MMCLIP.training import grad_cache
from MMCLIP.training.grad_cache import cached_backward


ROOT = Path(__file__).resolve().parents[1]
NUM_ROWS = 7


def make_batch() -> dict:
    """Seven rows, of which two have the same text and two no image."""
    batch = tiny_batch(NUM_ROWS)
    batch["group_ids"] = torch.tensor([0, 1, 2, 3, 4, 1, 6])
    batch["has_image"] = torch.tensor([True, True, False, True, True, True, False])
    return batch


def make_model(**fields) -> MMCLIPForPreTraining:
    torch.manual_seed(0)
    return MMCLIPForPreTraining(tiny_config(**fields))


def gradients(model) -> dict[str, torch.Tensor]:
    return {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}


def plain(model, batch) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    outputs = model(**batch)
    outputs.loss.backward()
    return outputs.loss.detach(), outputs.loss_info, gradients(model)


def assert_same(found: dict, expected: dict, tolerance: float = 1e-5):
    assert found.keys() == expected.keys()
    for name, values in expected.items():
        torch.testing.assert_close(found[name], values, rtol=1e-4, atol=tolerance * max(1.0, values.abs().max()))


@pytest.mark.parametrize("chunk_size", [1, 2, 3, 7, 9])
def test_rows_that_pass_a_few_at_a_time_give_the_loss_and_the_gradient_of_the_whole_batch(chunk_size):
    batch, model = make_batch(), make_model()
    loss, parts, expected = plain(model, batch)
    again = make_model()
    found, found_parts = cached_backward(again, batch, chunk_size)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    assert_same(found_parts, parts)
    assert_same(gradients(again), expected)
    assert min(values.abs().max() for values in expected.values()) > 0, "a part that takes no part proves nothing"


def test_heads_that_see_a_share_of_the_rows_see_the_first_ones_of_each_part():
    batch, fields = make_batch(), {"mim_row_ratio": 0.5, "mlm_row_ratio": 0.5}
    order = [0, 2, 4, 6, 1, 3, 5]  # the first row of each part of two comes first
    rows = {name: values[order] if len(values) == NUM_ROWS else values for name, values in batch.items()}
    model, again = make_model(**fields), make_model(**fields)
    loss, parts, expected = plain(model, rows)
    found, found_parts = cached_backward(again, batch, 2)
    torch.testing.assert_close(found, loss, rtol=1e-5, atol=1e-5)
    assert_same(found_parts, parts)
    assert_same(gradients(again), expected)


@pytest.mark.parametrize(
    "fields",
    [
        {"mim_weight": 0, "mlm_weight": 0, "prompt_weight": 0, "local_weight": 0},
        {"contrastive_weight": 0, "prompt_weight": 0, "local_weight": 0},
        {"contrastive_weight": 0, "mim_weight": 0, "mlm_weight": 0, "local_weight": 0},
    ],
    ids=["contrastive alone", "rebuilding alone", "prompts alone"],
)
def test_a_loss_that_is_switched_off_is_off_here_too(fields):
    batch, model = make_batch(), make_model(**fields)
    _, parts, expected = plain(model, batch)
    again = make_model(**fields)
    assert_same(cached_backward(again, batch, 3)[1], parts)
    found = gradients(again)
    assert_same({name: found[name] for name in expected}, expected)
    assert all(not found[name].any() for name in found.keys() - expected.keys())


def test_prompts_that_do_not_fit_their_labels_are_refused_here_too():
    for name in ("side_labels", "prompt_labels"):
        batch = make_batch()
        del batch[name]
        with pytest.raises(ValueError, match="two for each column of `prompt_labels`"):
            cached_backward(make_model(), batch, 2)


def test_the_factor_scales_the_gradient_and_what_is_there_already_stays():
    batch, model = make_batch(), make_model()
    expected = plain(model, batch)[2]
    again = make_model()
    for _ in range(2):
        loss, _ = cached_backward(again, batch, 3, factor=0.5)
    assert_same(gradients(again), expected)
    torch.testing.assert_close(loss, plain(make_model(), batch)[0], rtol=1e-5, atol=1e-5)


def test_both_passes_draw_the_same_dropout(monkeypatch):
    model = make_model(text_config={**tiny_config().text_config.to_dict(), "hidden_dropout_prob": 0.5})
    model.train()
    seen = []
    encode = model.encode_rows

    def listening(*arguments):
        rows = encode(*arguments)
        seen.append(rows.text_embeds.detach())
        return rows

    monkeypatch.setattr(model, "encode_rows", listening)
    cached_backward(model, make_batch(), 3)
    assert len(seen) == 6
    for first, second in zip(seen[:3], seen[3:], strict=True):
        assert torch.equal(first, second)
    assert not torch.allclose(seen[0], encode(*[make_batch()[key][:3] for key in (
        "pixel_values", "input_ids", "attention_mask")]).text_embeds)  # fmt: skip


# ------------------------------------------------------------------------------------------------------- many processes

# Imports once, then forks: the processes share the seconds that an import takes.
SHARED_OUT = """
import sys
import torch
from MMCLIP.training.grad_cache import average_gradients, cached_backward
from test_training_grad_cache import gradients, make_batch, make_model

def part_of_a_batch(rank, folder, num_processes, chunk_size):
    torch.set_num_threads(1)
    meet = f"file://{folder}/meet"
    torch.distributed.init_process_group("gloo", init_method=meet, rank=rank, world_size=num_processes)
    prompts = ("prompt_input_ids", "prompt_attention_mask")
    batch = {
        key: values if key in prompts else values.tensor_split(num_processes)[rank].clone()
        for key, values in make_batch().items()
    }
    model = make_model()
    if chunk_size:
        loss, parts = cached_backward(model, batch, chunk_size)
    else:
        outputs = model(**batch)
        outputs.loss.backward()
        loss, parts = outputs.loss.detach(), outputs.loss_info
    average_gradients(model)
    torch.distributed.all_reduce(loss)
    parts = {name: value.clone() for name, value in parts.items()}
    for value in parts.values():
        torch.distributed.all_reduce(value)
    if rank == 0:
        parts = {name: value / num_processes for name, value in parts.items()}
        torch.save((loss / num_processes, parts, gradients(model)), f"{folder}/found.pt")
    torch.distributed.destroy_process_group()

arguments = (sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
torch.multiprocessing.start_processes(part_of_a_batch, args=arguments, nprocs=arguments[1], start_method="fork")
"""


@pytest.mark.parametrize(("num_processes", "chunk_size"), [(2, 0), (4, 0), (2, 2)])
def test_processes_that_share_a_batch_unevenly_have_the_loss_and_every_gradient_of_one(
    tmp_path, num_processes, chunk_size
):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    words = [str(tmp_path), str(num_processes), str(chunk_size)]
    subprocess.run([sys.executable, "-c", SHARED_OUT, *words], env=environment, check=True, timeout=240)
    loss, parts, found = torch.load(tmp_path / "found.pt")
    expected_loss, expected_parts, expected = plain(make_model(), make_batch())
    torch.testing.assert_close(loss, expected_loss, rtol=1e-5, atol=1e-5)
    assert_same(parts, expected_parts)
    assert_same(found, expected)


def test_gradients_of_one_process_are_not_averaged_by_the_trainer_s_function(monkeypatch):
    monkeypatch.setattr(torch.distributed, "all_reduce", lambda *arguments, **options: pytest.fail("nobody to ask"))
    cached_backward(make_model(), make_batch(), 3)
    assert grad_cache.rows_per_process(3, torch.device("cpu")) == [3]
