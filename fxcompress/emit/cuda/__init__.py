"""Running compiled graphs on CUDA GPUs: Triton kernels, layers that choose among ways to compute, replayed graphs."""
