"""Carries out PTX on the host: what a compiler made of a kernel, run in the ordinary tests.

All threads of several blocks run in lockstep, a register being an array with one number a thread. Memory is the
process's own: a kernel reads and writes CPU tensors, and an access outside of them, or one that is not aligned, is an
error. What a shared memory or a register holds before it is written is poison. Instructions that approximate
("ex2.approx", "rcp.approx", "div.full") are as wrong as the PTX ISA lets them be, deterministically, and a product and
a sum that may become one fused operation do.

Shared memory that two warps touch, one of them writing, without a barrier between them is an error, and so is a wgmma
whose matrices are written before it was waited for. What cp.async brings is there once it was waited for. Not looked
at: results of a wgmma or of tcgen05 that are used too early (they are there at once), the order of blocks among
themselves, times.

Source of the semantics: NVIDIA, "Parallel Thread Execution ISA".
"""
