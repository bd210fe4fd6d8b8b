"""Glue between tensors and the compiled extension `dgemma_accel._C`."""
