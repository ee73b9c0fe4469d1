"""What a GPU has to show, in four commands of at most ten minutes each (docs/gpu.md):

    python -m benchmarks.gpu truth     is everything equal, race-free and repeatable on this card
    python -m benchmarks.gpu speed     how near to the card's own ceilings is it
    python -m benchmarks.gpu run       does training through the launcher save, stop and resume there
    python -m benchmarks.gpu tune      which tiles of the Triton kernels are the fastest there
    python -m benchmarks.gpu visit     what is to be known next, of these four, over several calls

`truth` and the kernel parts of `speed` import, of this repository, benchmarks/, model/kernels/ and what those import:
they need torch and triton alone.
"""
