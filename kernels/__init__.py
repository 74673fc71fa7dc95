"""FastSAM's Triton kernels: ``@triton.jit`` functions only, installed as ``fastsam.kernels``."""
