"""Accelerator kernels used by diffmm; depends on jax alone."""
