"""The commands behind `python -m dgemma_accel`."""
