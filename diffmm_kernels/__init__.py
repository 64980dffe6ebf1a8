"""Accelerator kernels used by diffmm; depends on jax alone.

`diffmm_kernels.sigmoid_attention`: sigmoid attention for Hopper GPUs, TPUs and XLA.
"""
