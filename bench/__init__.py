"""Measurements of every op and of a whole denoising step, beside what a user would run otherwise.

`python -m bench --help` lists the commands; docs/measuring.md says how each figure comes about.
"""

# Exit status of a bench that had no time for all of its cases.
INCOMPLETE = 3
# The ops that have cases, in `bench_<op>.py`.
OPS = (
    "block_attention",
    "row_stats",
    "commit",
    "head_stats",
    "soft_embedding",
    "experts",
    "feed_forward",
    "linears",
    "samplers",
)
