"""Floating-point operations of a step, ours and the plain one: counted, not timed.

    python -m benchmarks.count_operations

Runs both on torch's meta device, which computes shapes only. A multiply-add counts as two operations.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from benchmarks.train_step import CASES, Case, our_side, plain_side


class Operations(TorchDispatchMode):
    """Counts while it is entered. (torch's own counter does not go together with `autograd.grad`.)"""

    def __init__(self) -> None:
        super().__init__()
        self.gflop: Counter[str] = Counter()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in flop_registry:
            self.gflop[str(operator)] += (
                flop_registry[operator](*args, **(kwargs or {}), out_val=result) / 1e9
            )
        return result


def counted(case: Case, side: str) -> Counter[str]:
    """GFLOP of one step by operator."""
    with torch.device("meta"):
        run = our_side(case, "float32", device="meta")[0] if side == "ours" else plain_side(case, None, None)
        with Operations() as operations:
            run()
    return operations.gflop


def main() -> None:
    """Print one row for each case."""
    print("| case | plain GFLOP | ours GFLOP | ratio | ours forward / backward |")
    print("|---|---|---|---|---|")
    for name, case in CASES.items():
        plain, parts = counted(case, "plain").total(), counted(case, "ours")
        ours, backward = parts.total(), parts["aten.convolution_backward"]
        ratio = f"{plain / ours:.2f}x"
        print(f"| {name} | {plain:.0f} | {ours:.0f} | {ratio} | {ours - backward:.0f} / {backward:.0f} |")


if __name__ == "__main__":
    main()
