"""Memory and time of a step against batch size and processes: python benchmarks/scaling.py --json FILE

The full step of MMCLIP (as in `training_step.py`, texts of one length) in fresh processes that share a batch under
DistributedDataParallel, on a CPU with gloo and its threads shared out, on GPUs with NCCL and one process each: whole,
with gradient checkpointing, and with GradCache at a few rows at a time. Memory is the peak of one process without what
it held before it made the model, on a GPU what torch allocated. Then the contrastive loss alone, forward and backward,
for batches of embeddings: with its similarities whole, and in the chunks that it makes from 2^24 similarities on.
`--quick` only shows that it runs.
"""

import json
import os
import socket
from multiprocessing import get_context
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
import torch.distributed as dist
import torch.nn.functional as F
import transformers
from benchmark_tools import argument_parser, in_turns, machine, write_results
from MMCLIP.modeling_mmclip import contrastive_loss
from torch.nn.parallel import DistributedDataParallel
from training_step import Trained, make_batch, memory, peak_memory

from MMCLIP.training.grad_cache import average_gradients, cached_backward


FORMS = {"whole": "", "checkpointed": " with gradient checkpointing", "cached": " with GradCache"}
EMBED_SIZE = 512


def free_port() -> str:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return str(listener.getsockname()[1])


# ------------------------------------------------------------------------------------------------------------- the step


def step_of_process(
    rank: int, num_processes: int, port: str, form: str, options: dict, folder: str, num_threads: int
) -> None:
    """Steps of one process; writes its seconds and peak to `folder`."""
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(num_threads)
    device = torch.device(options["device"], rank) if options["device"] == "cuda" else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if num_processes > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo", rank=rank, world_size=num_processes)
    before = memory("VmRSS")
    trained = Trained("full", options["size"], device, checkpointing=form == "checkpointed")
    trained.fill_optimizer()
    batch = make_batch("full", options["size"], options["batch_size"], "none")
    share = slice(rank * options["batch_size"] // num_processes, (rank + 1) * options["batch_size"] // num_processes)
    shared = {"prompt_input_ids", "prompt_attention_mask"}
    batch = {name: value if name in shared else value[share] for name, value in batch.items()}
    model = trained.model
    if num_processes > 1 and form != "cached":
        model = DistributedDataParallel(model)

    def step():
        rows = trained.on_device(batch)
        if form == "cached":
            cached_backward(model, rows, options["cached_rows"], autocast=trained.autocast)
            if num_processes > 1:
                average_gradients(model)
        else:
            with trained.autocast():
                loss = model(**rows).loss
            loss.backward()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        if device.type == "cuda":
            torch.cuda.synchronize()

    seconds = in_turns(options["num_rounds"], step=step)["step"]
    Path(folder, f"{rank}.json").write_text(json.dumps([seconds, peak_memory(before, device)]))
    if num_processes > 1:
        dist.destroy_process_group()


def measure_step(num_processes: int, form: str, options: dict) -> tuple[float, float | None]:
    """Seconds of the slowest process and MB of the largest."""
    num_threads = max(torch.get_num_threads() // num_processes, 1)
    context, port = get_context("spawn"), free_port()
    with TemporaryDirectory() as folder:
        processes = [
            context.Process(
                target=step_of_process, args=(rank, num_processes, port, form, options, folder, num_threads)
            )
            for rank in range(num_processes)
        ]
        for process in processes:
            process.start()
        for process in processes:
            process.join()
        if any(process.exitcode for process in processes):
            raise RuntimeError(f"a process of {num_processes} failed at batch {options['batch_size']}, {form}.")
        found = [json.loads(Path(folder, f"{rank}.json").read_text()) for rank in range(num_processes)]
    seconds, peaks = zip(*found, strict=True)
    return max(seconds), None if None in peaks else max(peaks)


# ------------------------------------------------------------------------------------------------------------- the loss


def loss_of_process(queue, batch_size: int, max_logits: int, device: str) -> None:
    torch.manual_seed(0)
    images, texts = (
        F.normalize(torch.randn(batch_size, EMBED_SIZE, device=device), dim=-1).requires_grad_() for _ in range(2)
    )
    scale = torch.tensor(14.3, device=device, requires_grad=True)
    before = memory("VmRSS")

    def run():
        contrastive_loss(images, texts, scale, max_logits=max_logits).backward()
        if device == "cuda":
            torch.cuda.synchronize()

    seconds = in_turns(2, run=run)["run"]
    queue.put((seconds, peak_memory(before, torch.device(device))))


def measure_loss(batch_size: int, max_logits: int, device: str) -> tuple[float, float | None]:
    context = get_context("spawn")
    queue = context.Queue()
    process = context.Process(target=loss_of_process, args=(queue, batch_size, max_logits, device))
    process.start()
    found = queue.get()
    process.join()
    return found


def main():
    parser = argument_parser(__doc__.partition(":")[0])
    parser.add_argument("--size", choices=("ti", "s", "b"), help="ViT and BERT of this width (default s, on a GPU b)")
    parser.add_argument("--batch_sizes", type=int, nargs="+", help="default 8 16 32 64, on a GPU 64 128 256 512")
    parser.add_argument("--processes", type=int, nargs="+", help="default 1 2, on GPUs 1 and as many as there are")
    parser.add_argument("--cached_rows", type=int, help="rows at a time with GradCache (default 8, on a GPU 64)")
    parser.add_argument("--loss_batch_sizes", type=int, nargs="+", default=[4096, 8192, 16384])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cuda" if torch.cuda.is_available() else "cpu")
    arguments = parser.parse_args()
    on_gpu = arguments.device == "cuda"
    size = arguments.size or ("b" if on_gpu else "s")
    batch_sizes = arguments.batch_sizes or ([64, 128, 256, 512] if on_gpu else [8, 16, 32, 64])
    processes = arguments.processes or sorted({1, torch.cuda.device_count() if on_gpu else 2})
    options = {"size": size, "device": arguments.device, "cached_rows": arguments.cached_rows or (64 if on_gpu else 8)}
    options["num_rounds"] = 10 if on_gpu else 2
    forms, loss_batch_sizes = list(FORMS), arguments.loss_batch_sizes
    if arguments.quick:
        options |= {"size": "quick", "num_rounds": 1, "cached_rows": 2}
        batch_sizes, processes, forms, loss_batch_sizes = [4], [2], ["cached"], [64]

    # glibc would keep freed tensors of medium size in its heap, often more of them than the step holds
    os.environ["MALLOC_MMAP_THRESHOLD_"] = "1000000"
    measures, results = {}, {}

    def note(name, label, found, number):
        measures[f"{name}_rate"] = (f"{label}, samples a second",)
        measures[f"{name}_mb"] = (f"{label}, peak memory of a process, MB",)
        results[f"{name}_rate"], results[f"{name}_mb"] = number / found[0], found[1]

    for batch_size in batch_sizes:
        for num_processes in processes:
            for form in forms:
                found = measure_step(num_processes, form, {**options, "batch_size": batch_size})
                label = f"batch {batch_size} over {num_processes} processes{FORMS[form]}"
                note(f"step_{batch_size}_{num_processes}_{form}", label, found, batch_size)
    for batch_size in loss_batch_sizes:
        for form, max_logits in (("whole", batch_size**2), ("chunked", min(2**24, batch_size**2 // 4))):
            found = measure_loss(batch_size, max_logits, arguments.device)
            note(f"loss_{batch_size}_{form}", f"contrastive loss of {batch_size}, {form}", found, batch_size)
    about = {
        **machine(str(torch.get_num_threads()), ("torch", "transformers")),
        "device": torch.cuda.get_device_name() if on_gpu else "cpu",
        "precision": "bfloat16" if on_gpu else "float32",
        "size": options["size"],
        "cached_rows": options["cached_rows"],
        "quick": arguments.quick,
    }
    write_results(measures, results, about, arguments.json, {})


if __name__ == "__main__":
    main()
