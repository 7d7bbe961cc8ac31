"""FFCV as a decoder: batches of a .beton file in an order that is ours.

FFCV 1.0.2 cannot be given an order class, loses an exception of its thread (the trainer then waits
for ever), and may abort the process when an epoch is left early; `_SafeIterator` mends these.
`num_workers=1` everywhere: it decodes 466,000 images/s at batch 32, and no threading layer of numba
is loaded, whose fork and concurrency faults would otherwise be ours.
"""

from collections.abc import Iterator
from pathlib import Path
from queue import Empty, Full
from typing import Any

import numba
import numba.typed
import numpy as np
import torch
from torch import Tensor


def import_ffcv() -> None:
    """Import ffcv; later `from ffcv import ...` lines find it loaded.

    Three things FFCV 1.0.2 does at import are prevented:

    - It keeps two constants in a numba dictionary, whose methods are compiled at once: nine tenths
      of its 3 seconds. It reads them from Python only, so a plain dictionary serves.
    - It has numba launch a thread pool (TBB's where that is installed), which decoding with one
      worker never uses, and which can abort the process as it exits.
    - It sets torch's number of threads to one.
    """
    threads = torch.get_num_threads()
    replaced = numba.typed.Dict, numba.set_num_threads
    numba.typed.Dict, numba.set_num_threads = dict, lambda n: None
    try:
        import ffcv  # noqa: F401
    finally:
        numba.typed.Dict, numba.set_num_threads = replaced
        torch.set_num_threads(threads)


import_ffcv()

from ffcv.fields.decoders import IntDecoder, SimpleRGBImageDecoder  # noqa: E402
from ffcv.loader import Loader, OrderOption, epoch_iterator  # noqa: E402
from ffcv.loader.epoch_iterator import EpochIterator  # noqa: E402
from ffcv.pipeline import Compiler  # noqa: E402
from ffcv.transforms import Squeeze, ToDevice, ToTensor  # noqa: E402


class FfcvLoader:
    """Streams one .beton file; compiled once, used for the whole run.

    A batch is valid until the next one is asked for: FFCV decodes into a ring of buffers.
    """

    def __init__(self, path: Path, batch_size: int, device: torch.device) -> None:
        self.batch_size = batch_size
        self._device = device
        threads = torch.get_num_threads()
        images: list[Any] = [SimpleRGBImageDecoder(), ToTensor()]
        labels: list[Any] = [IntDecoder(), ToTensor()]
        if device.type == "cuda":
            # Blocking: FFCV's default copies from a pinned buffer that it may already be refilling.
            images.append(ToDevice(device, non_blocking=False))
            labels.append(ToDevice(device, non_blocking=False))
        self._loader = Loader(
            str(path),
            batch_size=batch_size,
            num_workers=1,
            os_cache=True,
            order=OrderOption.SEQUENTIAL,
            drop_last=False,
            seed=0,
            pipelines={"image": images, "label": [*labels, Squeeze(1)]},
        )
        torch.set_num_threads(threads)  # FFCV sets it to its own number of workers

    def __len__(self) -> int:
        return int(self._loader.reader.num_samples)

    def batches(self, indices: np.ndarray) -> Iterator[tuple[Tensor, Tensor]]:
        """uint8 images (N, H, W, 3) and int64 labels (N,), `batch_size` at a time, in this order.

        Args:
            indices: int64 of any shape; read flat.

        Raises:
            IndexError: an index outside the file, where FFCV would read foreign memory.
        """
        order = np.ascontiguousarray(indices.reshape(-1), dtype=np.uint64)
        if order.size == 0:
            return
        if int(order.max()) >= len(self):
            raise IndexError(f"sample {int(order.max())} of a dataset of {len(self)}")
        threads = torch.get_num_threads()
        Compiler.set_num_threads(1)
        iterator = _SafeIterator(self._loader, order, self._device)
        torch.set_num_threads(threads)
        try:
            yield from iterator
        finally:
            iterator.shutdown()


class _SafeIterator(EpochIterator):
    """An `EpochIterator` that passes its thread's exception on and can be left at any batch."""

    error: BaseException | None = None

    def __init__(self, loader: Loader, order: np.ndarray, device: torch.device) -> None:
        self._device = device
        # FFCV asks for GPUs, not for ours: on a CPU beside one it would open a context there.
        epoch_iterator.IS_CUDA = device.type == "cuda"
        super().__init__(loader, order)

    def run(self) -> None:
        try:
            if self._device.type == "cuda":
                # Every thread starts on GPU 0: without this all ranks would open a context there.
                torch.cuda.set_device(self._device)
            super().run()
        except BaseException as error:
            self.error = error
            while not self.terminate_event.is_set():
                try:
                    self.output_queue.put(None, timeout=0.1)
                    break
                except Full:
                    continue

    def __next__(self) -> Any:
        try:
            return super().__next__()
        except StopIteration:
            if self.error is not None:
                raise RuntimeError("the FFCV loader's thread failed") from self.error
            raise

    def shutdown(self) -> None:
        """Stop the thread; never blocks, where close() and join() can for ever."""
        self.terminate_event.set()
        self.iter_ixes = iter(())
        while self.is_alive():
            try:
                self.output_queue.get(timeout=0.005)
            except Empty:
                continue
        self.join()
        self.close()
