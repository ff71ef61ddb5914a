"""The first check of rlpost on an NVIDIA GPU: ten stages, eight minutes at most, nothing downloaded.

    make gpu-check                                    on a GPU
    make gpu-check GPU_CHECK="--device cpu --small"   the same stages with tiny shapes, to try the check itself

``runner`` starts each stage in a process of its own; ``stages`` is their table. docs/gpu.md says what each one shows.
"""
