"""How busy a GPU is, from the driver's own library: what nvidia-smi shows."""

import ctypes
from typing import Any

import torch


class _Rates(ctypes.Structure):
    _fields_ = (("gpu", ctypes.c_uint), ("memory", ctypes.c_uint))


class Utilisation:
    """The share of the driver's last sample, up to a second, in which a kernel ran on a GPU."""

    def __init__(self, device: torch.device) -> None:
        self._library: Any = None
        self._handle = ctypes.c_void_p()
        # By name: CUDA_VISIBLE_DEVICES numbers GPUs otherwise than the driver does.
        name = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            if library.nvmlInit_v2() == 0:
                found = library.nvmlDeviceGetHandleByUUID(name, ctypes.byref(self._handle))
                self._library = library if found == 0 else None
        except (OSError, AttributeError):
            return

    def read(self) -> float | None:
        """In [0, 1]; None where the driver does not tell, as of a part of a GPU (MIG)."""
        rates = _Rates()
        if self._library is None:
            return None
        failed = self._library.nvmlDeviceGetUtilizationRates(self._handle, ctypes.byref(rates))
        return None if failed else rates.gpu / 100
