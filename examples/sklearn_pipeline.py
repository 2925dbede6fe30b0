"""A scikit-learn pipeline on tensors: scaled, and classified, by the tensor's own library. Needs scikit-learn.

python examples/sklearn_pipeline.py torch|array_api_strict|numpy
"""

import importlib
import os
import sys

os.environ["SCIPY_ARRAY_API"] = "1"  # scikit-learn asks for it, before SciPy is imported

import sklearn
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer, MinMaxScaler

from nnfwd.demo import digits

xp = importlib.import_module(sys.argv[1] if len(sys.argv) > 1 else "torch")
net, images, labels = digits()
x = xp.asarray(images, dtype=xp.float32)

pipeline = make_pipeline(MinMaxScaler(), FunctionTransformer(net[1:]))  # a slice: the scaler is scikit-learn's
with sklearn.config_context(array_api_dispatch=True):  # without it scikit-learn would make a NumPy array of x
    y = pipeline.fit(x).transform(x)
right = int(xp.count_nonzero(xp.argmax(y, axis=-1) == xp.asarray(labels)))
print(f"{type(y).__module__}.{type(y).__name__} of {y.dtype}: {right} of {len(labels)} are right")
