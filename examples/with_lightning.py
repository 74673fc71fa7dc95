"""Lightning on noisy digits: one callback, then every option of the Trainer works.

pip install lightning scikit-learn
python examples/with_lightning.py
"""

import lightning
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

from fastsam import FastSAM
from fastsam.demo.data import load_noisy_digits
from fastsam.integrations.lightning import FastSAMCallback, SharpnessMonitor


class Classifier(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Flatten(), nn.Linear(64, 128), nn.ReLU(), nn.Linear(128, 10))

    def training_step(self, batch, batch_idx):
        images, labels = batch
        loss = F.cross_entropy(self.net(images), labels)
        self.log("loss", loss, prog_bar=True)  # the first pass's
        return loss

    def validation_step(self, batch, batch_idx):
        images, labels = batch
        self.log("accuracy", (self.net(images).argmax(1) == labels).float().mean(), prog_bar=True)

    def configure_optimizers(self):
        optimizer = FastSAM(self.parameters(), rho=0.2, lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, self.trainer.max_epochs)]


def train(epochs=10, **options):
    """Returns the accuracy on the test digits."""
    lightning.seed_everything(0)
    data = load_noisy_digits(noise=0.4, seed=0)
    train_set = TensorDataset(data.train_images, data.train_labels)
    test_set = TensorDataset(data.test_images, data.test_labels)
    callbacks = [FastSAMCallback(), SharpnessMonitor(every=10)]
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accumulate_grad_batches=2,
        gradient_clip_val=1.0,
        callbacks=callbacks,
        enable_checkpointing=False,
        logger=False,
        **options,
    )
    trainer.fit(Classifier(), DataLoader(train_set, 25, shuffle=True), DataLoader(test_set, 1000))
    print(f"ascent sharpness, in the last steps: {callbacks[1].monitor.history[-1]['ascent']:.3f}")
    return trainer.callback_metrics["accuracy"].item()


if __name__ == "__main__":
    print(f"{100 * train():.1f}% test accuracy, trained with 40% wrong labels")
