"""skorch on noisy digits: FastSAM is an optimizer like any other, and a grid search finds rho.

pip install skorch scikit-learn
python examples/with_skorch.py
"""

from sklearn.model_selection import GridSearchCV
from skorch import NeuralNetClassifier
from skorch.callbacks import GradientNormClipping
from torch import nn

from fastsam import FastSAM
from fastsam.demo.data import load_noisy_digits


def train(epochs=10, rhos=(0.0, 0.05, 0.2)):
    """Returns the best rho by cross-validation, and the accuracy on the test digits."""
    data = load_noisy_digits(noise=0.4, seed=0)
    net = NeuralNetClassifier(
        nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10)),
        criterion=nn.CrossEntropyLoss,
        optimizer=FastSAM,
        optimizer__momentum=0.9,
        lr=0.05,
        batch_size=50,
        max_epochs=epochs,
        train_split=None,
        callbacks=[("clipping", GradientNormClipping(1.0))],
        verbose=0,
    )
    search = GridSearchCV(net, {"optimizer__rho": list(rhos)}, cv=3, scoring="accuracy")
    search.fit(data.train_images.numpy(), data.train_labels.numpy())
    return search.best_params_["optimizer__rho"], search.score(data.test_images.numpy(), data.test_labels.numpy())


if __name__ == "__main__":
    best, accuracy = train()
    print(f"{100 * accuracy:.1f}% test accuracy with rho={best}, trained with 40% wrong labels")
