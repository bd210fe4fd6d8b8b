"""Triton kernels; installed as `dgemma_accel.triton_kernels`."""
