"""Trains the demo's network on scikit-learn's scans of handwritten digits; needs scikit-learn.

    python examples/train_digits.py [FOLDER]

writes digits.npz (the network) and digits_heldout.npz (450 images it has not seen, and their labels) to FOLDER, by
default the ones that nnfwd ships. The images are from E. Alpaydin and C. Kaynak, Optical Recognition of Handwritten
Digits, UCI Machine Learning Repository, 1998: 8 x 8 pixels, 0 to 16.
"""

import sys
from pathlib import Path

import numpy as np
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from sklearn.neural_network import MLPClassifier

import nnfwd

folder = Path(sys.argv[1] if len(sys.argv) > 1 else Path(nnfwd.__file__).parent / "data")
images, labels = load_digits(return_X_y=True)
x_train, x_test, y_train, y_test = train_test_split(images, labels, test_size=450, random_state=0, stratify=labels)

mlp = MLPClassifier((32,), alpha=0.5, max_iter=1000, random_state=0)
mlp.fit(x_train / 16, y_train)

hidden, output = (
    nnfwd.Dense(weight.T.astype("float32"), bias.astype("float32"), activation)  # scikit-learn stores (in, out)
    for weight, bias, activation in zip(mlp.coefs_, mlp.intercepts_, ("relu", "softmax"), strict=True)
)
net = nnfwd.Network([nnfwd.Scale(1 / 16), hidden, output])
nnfwd.save(net, folder / "digits.npz")
np.savez_compressed(folder / "digits_heldout.npz", images=x_test.astype("uint8"), labels=y_test.astype("uint8"))
accuracy = np.mean(net(x_test).argmax(axis=-1) == y_test)
print(f"{folder}: accuracy {accuracy:.4f} on {len(y_test)} held-out digits")
