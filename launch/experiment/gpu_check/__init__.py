"""The check of the CUDA path on a real GPU, `launch/gpu_check.py`: torch, Triton, pytest and numpy are enough."""
