"""Measurements of every op and of a whole denoising step, beside what a user would run otherwise.

`python -m bench --help` lists the commands; docs/measuring.md says how each figure comes about.
"""

# Exit status of a bench that had no time for all of its cases.
INCOMPLETE = 3
# What `python -m bench` does besides timing ops: name -> (module, what for).
COMMANDS = {
    "step": ("bench_step", "time a whole denoising step"),
    "report": ("report", "write the README's table and the plots from result files"),
    "tune": ("tune", "search tile shapes of an op for this GPU"),
    "auto": ("auto", "let result files decide which kernel `auto` takes"),
    "gpu": ("gpu", "all that needs a GPU, inside a time budget"),
    "sanitize": ("gpu", "the gpu tests under compute-sanitizer"),
}
# The ops that have cases, in `bench_<op>.py`.
OPS = (
    "block_attention",
    "row_stats",
    "top_k_top_p",
    "commit",
    "head_stats",
    "soft_embedding",
    "experts",
    "feed_forward",
    "linears",
    "samplers",
)
