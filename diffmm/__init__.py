"""diffmm: multi-modal masked diffusion in JAX.

Rooms are imported by name (``import diffmm.diffusion``); importing the package
itself loads nothing heavy and starts no accelerator.

| room | what lives there |
|---|---|
| ``diffmm.data`` | vocabulary, tokenizers, row layout, packing, mixtures, sources |
| ``diffmm.diffusion`` | schedules, masking, losses, likelihood bounds |
| ``diffmm.models`` | layers, denoiser, caches, presets, importers, FSQ autoencoder |
| ``diffmm.optim`` | per-leaf AdamW, batch and duration rule, averages of weights |
| ``diffmm.parameterisation`` | Complete^(d)P and others, per-module factors, checks |
| ``diffmm.policies`` | learned unmasking: network, rewards, GRPO, imitation |
| ``diffmm.samplers`` | one loop, selection rules, guidance, filters, caches |
| ``diffmm.training`` | train state and step over a mesh, checkpoints, metrics |
"""

from diffmm.version import __version__ as __version__
