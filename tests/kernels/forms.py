"""The forms and dtypes that the tests of an op run through."""

import torch

from fastsae_kernels import _cpp

# Triton's interpreter computes on the bits of a bf16 and truncates where a GPU rounds, so bf16 kernels need a GPU.
TRITON_HALVES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
TRITON_DTYPES = [torch.float32, *TRITON_HALVES]
TRITON = [("triton", dtype) for dtype in TRITON_DTYPES]
# C++ takes tensors in the CPU's memory, where these tests' are unless there is a GPU; test_cpp.py sees to it that it can be had.
HAS_CPP = _cpp.is_available() and not torch.cuda.is_available()
CPP = [("cpp", torch.float32), ("cpp", torch.bfloat16)] if HAS_CPP else []
FORMS = [("torch", torch.float32), ("torch", torch.bfloat16), *CPP, *TRITON]
ALL_FORMS = [("torch", torch.float16), *FORMS]
BACKENDS = ["torch", *(["cpp"] if HAS_CPP else []), "triton"]
