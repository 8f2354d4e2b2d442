"""The scan's backward pass in CUDA C++, compiled on first use by NVRTC, which comes with torch for CUDA.

It replaces one kernel of `arm_cuda.triton`; all others stay. Triton chooses the layout of values over lanes
itself, and exchanges them through shared memory several times a token; here the layout is explicit.
"""
