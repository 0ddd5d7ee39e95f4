"""Side-by-side measurements: `python -m benchmarks [--only NAME ...] [--quick]`.

One process, interleaved, medians and ratios; the tables land in RESULTS.md. Nothing is downloaded: the base has
Stable Diffusion 1.5's exact shape and random weights.
"""
