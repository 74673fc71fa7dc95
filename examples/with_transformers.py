"""Transformers on noisy digits: SAMTrainer in the place of Trainer; the arguments stay as they are.

pip install transformers accelerate scikit-learn
python examples/with_transformers.py
"""

import tempfile

import torch
from transformers import TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from fastsam.demo.data import load_noisy_digits
from fastsam.integrations.transformers import SAMTrainer


def examples_of(images, labels):
    return [{"pixel_values": image, "labels": label} for image, label in zip(images, labels, strict=True)]


def accuracy_of(predictions):
    return {"accuracy": float((predictions.predictions.argmax(1) == predictions.label_ids).mean())}


def train(epochs=60, **options):
    """Returns the accuracy on the test digits."""
    set_seed(0)
    data = load_noisy_digits(noise=0.4, seed=0)
    sizes = {"image_size": 8, "patch_size": 2, "num_channels": 1, "hidden_size": 32, "intermediate_size": 64}
    model = ViTForImageClassification(ViTConfig(**sizes, num_hidden_layers=2, num_attention_heads=4, num_labels=10))
    arguments = TrainingArguments(
        output_dir=tempfile.mkdtemp(),
        num_train_epochs=epochs,
        per_device_train_batch_size=25,
        gradient_accumulation_steps=2,
        learning_rate=3e-3,
        weight_decay=0.05,
        logging_steps=50,
        save_strategy="no",
        report_to=[],
        remove_unused_columns=False,
        **options,
    )
    trainer = SAMTrainer(
        model,
        arguments,
        train_dataset=examples_of(data.train_images, data.train_labels),
        eval_dataset=examples_of(data.test_images, data.test_labels),
        compute_metrics=accuracy_of,
        sam={"rho": 0.1},  # over AdamW with the learning rate and weight decay above
    )
    trainer.train()
    return trainer.evaluate()["eval_accuracy"]


if __name__ == "__main__":
    torch.set_num_threads(2)
    print(f"{100 * train():.1f}% test accuracy, trained with 40% wrong labels")
