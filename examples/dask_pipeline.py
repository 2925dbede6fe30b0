"""The pass in the middle of a lazy Dask pipeline: nothing is computed before the last line. Needs nnfwd[dask]."""

import dask.array as da

from nnfwd.demo import digits

net, images, labels = digits()
many = da.tile(da.from_array(images, chunks=(150, 64)), (40, 1))  # 18,000 images in chunks of rows
bright = many[many.mean(axis=1) > 4]  # how many there are is not known yet
probability = net(bright)  # one task a chunk, for the whole network
print("lazy:    ", probability)
share = da.bincount(probability.argmax(axis=1), minlength=10) / len(labels) / 40
print("computed:", share.compute().round(3))
