"""Bytes that a computation on a CPU holds: the live storages under a dispatch mode, and the most there ever were."""

import weakref

import torch
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts storages that ops make while it is on, those inside fastsae_kernels' ops too; what was there before counts 0."""

    def __init__(self, *known):
        super().__init__()
        self.now = self.peak = 0
        self.at_peak = ""
        self._seen = weakref.WeakSet()
        for tensor in known:
            self._seen.add(tensor.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        own = OPDEFS.get(func.name().split(".")[0]) if func.namespace == "fastsae" else None
        if own is None:
            out = func(*args, **kwargs)
        else:
            with self:  # its Python body, op by op
                out = own._init_fn(*args, **kwargs)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor):
                parts = [tensor]
                if tensor.layout == torch.sparse_csr:
                    parts = [tensor.crow_indices(), tensor.col_indices(), tensor.values()]
                for part in parts:
                    if part.is_mkldnn:  # opaque: no storage, and gone with the tensor
                        self._count(part, part.numel() * part.element_size(), func)
                    else:
                        self._count(part.untyped_storage(), part.untyped_storage().nbytes(), func)
        return out

    def _count(self, owner, size, func):
        if owner in self._seen:
            return
        self._seen.add(owner)
        self.now += size
        if self.now > self.peak:
            self.peak, self.at_peak = self.now, str(func)
        weakref.finalize(owner, self._free, size)

    def _free(self, size):
        self.now -= size
