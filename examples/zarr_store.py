"""From one Zarr store to another, a few chunks in memory at a time, in two ways. Needs nnfwd[dask] and zarr 3."""

import tempfile

import dask.array as da
import numpy as np
import zarr

import nnfwd
from nnfwd.demo import digits

net, images, labels = digits()
with tempfile.TemporaryDirectory() as folder:
    source = f"{folder}/x.zarr"
    zarr.create_array(source, data=np.tile(images, (40, 1)), chunks=(3000, 64))

    nnfwd.stream(net, source, f"{folder}/streamed.zarr")  # can be interrupted, and resumed
    net(da.from_zarr(source)).to_zarr(f"{folder}/dask.zarr")  # where it is one step of many, or on a cluster

    for name in ("x", "streamed", "dask"):
        store = zarr.open_array(f"{folder}/{name}.zarr", mode="r")
        print(f"{name:9} {store.shape} of {store.dtype} in chunks of {store.chunks}")
    streamed, by_dask = (zarr.open_array(f"{folder}/{name}.zarr", mode="r")[:] for name in ("streamed", "dask"))
print("the same digits:", np.array_equal(streamed.argmax(axis=-1), by_dask.argmax(axis=-1)))
print(f"accuracy {np.mean(streamed.argmax(axis=-1) == np.tile(labels, 40)):.4f}")
