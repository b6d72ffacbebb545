"""The forms and dtypes that the tests of an op run through."""

import torch

# Triton's interpreter computes on the bits of a bf16 and truncates where a GPU rounds, so bf16 kernels need a GPU.
TRITON_HALVES = [torch.float16, torch.bfloat16] if torch.cuda.is_available() else [torch.float16]
TRITON_DTYPES = [torch.float32, *TRITON_HALVES]
TRITON = [("triton", dtype) for dtype in TRITON_DTYPES]
FORMS = [("torch", torch.float32), ("torch", torch.bfloat16), *TRITON]
ALL_FORMS = [("torch", torch.float16), *FORMS]
