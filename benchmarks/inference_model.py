"""Generating with G1 at 512x256 or a U-Net at 256x256: settings against the published code, alternating.

python -m benchmarks.inference_model [--network g1] [--turns 5] [--settings frozen bf16 ...]

    published       eager float32, the layers of the published code
    plain           our network without `stages.models.fast`
    trained         in the faster modules that training uses
    frozen          in those for frozen weights, as batch inference does it
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext

import torch
from torch import Tensor, nn

from benchmarks.train_step import HD_INPUTS, Case, make_batch
from stages.models.architecture import InputSpec, Pix2Pix, Pix2PixHD
from stages.models.build import build_generator
from stages.models.fast.accelerate import accelerate
from stages.models.fast.frozen import freeze
from stages.models.fast.heap import keep_freed_memory, return_freed_memory
from stages.models.inputs import make_condition
from tests.reference.published_step import PlainGenerator, PlainUnet, copy_weights

CASES = {
    "g1": (Case(Pix2PixHD(enhancers=0), (512, 256)), HD_INPUTS),
    "unet": (Case(Pix2Pix(dropout="none"), (256, 256)), InputSpec()),
}
SETTINGS = ("plain", "trained", "frozen", "bf16", "compiled", "compiled-bf16")


def built(network: str) -> nn.Module:
    """Our generator of that name."""
    case, inputs = CASES[network]
    return build_generator(case.arch, inputs, enhancers=0 if network == "g1" else None)


def generator(
    setting: str, weights: nn.Module, name: str
) -> tuple[Callable[[Tensor], Tensor], torch.dtype | None]:
    """A way to run the generator, and the dtype of its autocast."""
    network = built(name)
    network.load_state_dict(weights.state_dict())
    network.eval().requires_grad_(False)
    bf16 = setting.endswith("bf16")
    if setting == "trained":
        network = accelerate(network, device="cpu")
    elif setting in ("frozen", "bf16"):
        network = freeze(network, device="cpu", dtype=torch.bfloat16 if bf16 else torch.float32)
    run: Callable[[Tensor], Tensor] = network
    if setting.startswith("compiled"):
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        run = torch.compile(network, options={"freezing": True})
    return run, torch.bfloat16 if bf16 else None


def main() -> None:
    """Measure and print one row for each setting."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--network", choices=CASES, default="g1")
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=SETTINGS)
    parser.add_argument("--turns", type=int, default=5)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--cpu-time", action="store_true", help="for a busy machine, with --threads 1")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.cpu_time else time.perf_counter
    case, inputs = CASES[arguments.network]
    batch = make_batch(case)
    condition = make_condition(batch.source, batch.instance, arch=case.arch, inputs=inputs)
    ours = built(arguments.network).eval()
    plain: nn.Module = PlainGenerator(condition.shape[1])
    if arguments.network == "unet":  # batch statistics at test time, as published
        plain = PlainUnet(condition.shape[1], 3, levels=8, width=64, noisy=set()).train()
    copy_weights(ours, plain)
    print(f"torch {torch.__version__}, {arguments.threads} threads, medians of {arguments.turns} in turns")
    print("| setting | published s | this s | ratio | largest difference |")
    print("|---|---|---|---|---|")
    for setting in arguments.settings:
        run, dtype = generator(setting, ours, arguments.network)
        x = condition if setting == "plain" else condition.contiguous(memory_format=torch.channels_last)
        times: tuple[list[float], list[float]] = ([], [])
        with torch.inference_mode():
            for turn in range(arguments.turns + 2):
                return_freed_memory()
                start = clock()
                expected = plain(condition)
                middle = clock()
                keep_freed_memory()
                again = clock()
                with torch.autocast("cpu", dtype) if dtype else nullcontext():
                    y = run(x)
                if turn >= 2:
                    times[0].append(middle - start)
                    times[1].append(clock() - again)
        first, second = (statistics.median(side) for side in times)
        difference = (y.float() - expected).abs().max().item()
        print(
            f"| {setting} | {first:.3f} | {second:.3f} | {first / second:.2f}x | {difference:.1e} |",
            flush=True,
        )


if __name__ == "__main__":
    main()
