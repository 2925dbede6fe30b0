"""Named dimensions and labels go through the pass, and it stays lazy. Needs nnfwd[dask] and xarray."""

import dask.array as da
import numpy as np
import xarray as xr

from nnfwd.demo import digits

net, images, labels = digits()
x = xr.DataArray(
    da.from_array(images.reshape(-1, 8, 8), chunks=(150, 8, 8)),
    dims=("image", "row", "column"),
    coords={"image": np.arange(1000, 1000 + len(images)), "truth": ("image", labels)},
    name="brightness",
)
y = xr.apply_ufunc(
    net,  # takes a Dask array as it is: no wrapper, one task a chunk
    x.stack(pixel=("row", "column")),
    input_core_dims=[["pixel"]],
    output_core_dims=[["digit"]],
    dask="allowed",
)
y = y.assign_coords(digit=range(10)).rename("probability")
print("lazy:    ", y.dims, y.data)
one = y.sel(image=1003)
print(f"computed: image 1003 is a {int(one.truth)}, read as {int(one.idxmax('digit'))}")
print(f"accuracy: {float((y.idxmax('digit') == y.truth).mean()):.4f}")
