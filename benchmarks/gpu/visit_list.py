"""The next time on one GPU: what is run there, in order. `python -m benchmarks.gpu visit` runs it (visit.py), and the
table in docs/untested-on-gpu.md is made of it (`python -m benchmarks.gpu tables`).

What decides stands first: whether kernels that no GPU has run are right, how fast the micro-step is, which tiles are
faster, and how fast it is with them.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Stop:
    """One start of a command."""

    command: str
    only: tuple[str, ...]
    """Beginnings of the names of its parts."""
    seconds: int
    """That it takes on an H200 by what records say of parts like it, with about 15 s to start."""
    why: str

    @property
    def limit(self) -> int:
        """Seconds after which it is ended: a kernel that hangs must not use up the call."""
        return 2 * self.seconds

    @property
    def call(self) -> str:
        return " ".join([self.command, *(f'--only "{name}"' for name in self.only)])


def of(command: str, only: str, seconds: int, why: str) -> Stop:
    """`only`: names, with commas between them."""
    return Stop(command, tuple(name.strip() for name in only.split(",")), seconds, " ".join(why.split()))


STOPS = [
    of(
        "truth",
        "compile bf16, equal 1b bf16, dropout masks, repeat 1b bf16",
        110,
        """never ran on a GPU: attention inside documents, `kernels.backend=sets`, the router's one launch, the entropy
        regulariser's three, σ-MoE's sum that adds the residual stream, its backward in pieces and its wide weight
        gradient, SwitchHead's sums that read choices where they stand. RoPE and the masks of experts were in no part of
        `truth`""",
    ),
    of(
        "speed",
        "ceiling, micro-step 1b graphs 8, micro-step 1b graphs 16, micro-step 1b graphs 32",
        60,
        """8, 16 and 32 sequences: by 8.6 ms + 14.5 ms a sequence, 16 make 37.0% MFU where 8 made 35.7%, 32 make
        37.7%""",
    ),
    of(
        "speed",
        "block 1b, micro-step 1b sets, kernel 1b sigma_moe, sparse 1b",
        60,
        """whether `sets` is below `dense`: 1.10 TFLOP of 1.65, so at two thirds of cuBLAS's rate it is even. σ-MoE
        beside `F.grouped_mm`. What sparse tensor cores make of the two products that `sets` leaves dense: with 1.4
        times cuBLAS's rate they are worth a backend, 0.1 ms each of a block's 2.2""",
    ),
    of(
        "tune",
        "sigma_moe forward 1b, sigma_moe backward 1b, sigma_moe weight gradient 1b, sigma_moe sum 1b",
        120,
        """σ-MoE is 30 of 124 ms, 1.6 times one cuBLAS product of its FLOPs. Its backward kernel took 0.52 ms where the
        forward one took 0.35 for the same bytes, and now has half the registers; a weight gradient, which took 0.20,
        reads a quarter less""",
    ),
    of(
        "tune",
        "set_gemm project value forward 1b, set_gemm project output backward 1b, set_gemm gradient value 1b, "
        "set_gemm gradient output 1b, gated_sum value 1b, gated_sum output 1b, gated_spread value 1b, "
        "gated_spread output 1b",
        180,
        "SwitchHead's value and output are 42 of 124 ms",
    ),
    of(
        "speed",
        "micro-step 1b tuned, block tuned 1b",
        110,
        """whether the tiles that were found reach 40% MFU, and 1.3 for SwitchHead's layer: beside today's, in one
        process""",
    ),
    of(
        "truth",
        "racecheck 1b switchhead, racecheck 1b sigma_moe, racecheck 1b route, racecheck 1b causal_attention, "
        "racecheck 1b elementwise",
        120,
        "races of the kernels that never ran",
    ),
    of(
        "speed",
        "kernel 1b causal_attention, micro-step 1b documents, micro-step 1b 8",
        60,
        """attention inside documents: faster than torch's with a mask, and a micro-step with documents no slower than
        one without""",
    ),
    of(
        "run",
        "cuda graphs 1b",
        140,
        """has not ended on a card. Its tokens per second are the first of an engine that does not wait for the GPU
        twice a micro-step (DeepSpeed's timer, off since), and with torch 2.13 autograd itself refuses a recording that
        would wait for the default stream""",
    ),
    of(
        "tune",
        "softmax 1b, norm forward 1b, norm backward 1b, norm sum 1b, rope 1b, route choose and place 1b, "
        "route place 1b",
        120,
        "the smaller kernels of the 1B model: loss 12, routing 7, norms 5 of 124 ms",
    ),
    of(
        "truth",
        "equal 262m bf16 switchhead, equal 262m bf16 causal_attention",
        60,
        "`sets` and attention inside documents at the published shapes",
    ),
    of(
        "speed",
        "micro-step 262m graphs 8",
        30,
        """sinusoids, the filled up hidden layer and the copied chunk of the published model have changed since it took
        32.6 ms""",
    ),
    of("run", "cuda graphs 262m", 120, "it must have the losses without graphs"),
    of("run", "compiled blocks 262m", 120, "has not ended on a card: torch 2.11 could not compile it, mended since"),
    of("speed", "counters", 70, "Nsight Compute, where it may read the counters"),
    of(
        "run",
        "quality",
        300,
        """all five models chose the highest of three learning rates; it now tries higher ones by itself, which no GPU
        has run. Needs its text (30 MB): `carry --text data/NAME`""",
    ),
]
