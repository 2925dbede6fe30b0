"""PyTorch's DataLoader feeds a network compiled by JAX, uncopied. Needs nnfwd[jax] and nnfwd[torch]."""

import jax.numpy as jnp
import torch
from torch.utils.data import DataLoader, TensorDataset

from nnfwd.demo import digits

net, images, labels = digits()
pixels = TensorDataset(torch.tensor(images, dtype=torch.float32), torch.tensor(labels))
run = net.compile(backend="jax", dtype="float32")
right = shared = 0
# With workers: num_workers=2, multiprocessing_context="spawn". A process forked once JAX is in use would wait for ever.
for batch, truth in DataLoader(pixels, batch_size=150):
    x = jnp.from_dlpack(batch, copy=False)  # an error where JAX must copy: on a CPU, memory not aligned to 64 bytes
    y = run(x)
    out = torch.from_dlpack(y)
    assert x.unsafe_buffer_pointer() == batch.data_ptr()
    assert y.unsafe_buffer_pointer() == out.data_ptr()
    shared += batch.nbytes + out.nbytes
    right += int((out.argmax(-1) == truth).sum())
print(f"{len(pixels)} images, {shared} bytes at one address in both libraries, accuracy {right / len(pixels):.4f}")

# CuPy, the same lines: run = net.compile(backend="cupy", dtype="float32"), and for each batch
#     batch = batch.cuda(non_blocking=True)  # the one way to the card; DataLoader(..., pin_memory=True)
#     x = cupy.from_dlpack(batch)  # x.data.ptr == batch.data_ptr()
#     y = torch.from_dlpack(run(x))
