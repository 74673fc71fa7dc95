"""Transformers' Trainer with SAMTrainer."""

import copy
import os
from contextlib import nullcontext
from functools import partial

import pytest
import torch
from setting import RHO, HandWrittenSAM, by_norm
from torch.nn import functional as F
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2LMHeadModel,
    TrainingArguments,
    get_linear_schedule_with_warmup,
)

from fastsam import FastSAM, methods
from fastsam.integrations.transformers import SAMTrainer
from fastsam.training import sam_step

CLIP = 0.05
SCALE = 1024.0
SGD = {"lr": 0.1, "momentum": 0.9}


def bert():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32, "max_position_embeddings": 16, "num_labels": 3}
    return BertForSequenceClassification(BertConfig(**sizes, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0))


def gpt2():
    torch.manual_seed(0)
    sizes = {"vocab_size": 50, "n_positions": 16, "n_embd": 16, "n_layer": 1, "n_head": 2}
    return GPT2LMHeadModel(GPT2Config(**sizes, resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0))


def dataset(count=32, *, language=False):
    generator = torch.Generator().manual_seed(5)
    ids = torch.randint(0, 50, (count, 8), generator=generator)
    labels = ids.clone() if language else torch.randint(0, 3, (count,), generator=generator)
    if language:  # of unlike length: micro-batches have unlike numbers of tokens
        for i, row in enumerate(labels):
            row[8 - i % 5 :] = -100
    return [
        {"input_ids": i, "attention_mask": torch.ones_like(i), "labels": y} for i, y in zip(ids, labels, strict=True)
    ]


class Recorded(SAMTrainer):
    """Remembers each step's micro-batches."""

    def __init__(self, *args, scale=None, **kwargs):
        self.scale, self.steps = scale, []
        super().__init__(*args, **kwargs)

    def create_accelerator_and_postprocess(self):
        super().create_accelerator_and_postprocess()
        if self.scale is not None:  # Accelerate does this on a GPU only
            self.accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=self.scale)
            self.accelerator.native_amp = True

    def get_batch_samples(self, *args, **kwargs):
        samples = super().get_batch_samples(*args, **kwargs)
        self.steps.append([{name: value.clone() for name, value in batch.items()} for batch in samples[0]])
        return samples


def trainer_of(
    folder, model, *, language=False, optimizer=SGD, method=None, base=torch.optim.SGD, scale=None, **options
):
    options |= {} if scale is None else {"fp16": True}
    defaults = {"per_device_train_batch_size": 8, "num_train_epochs": 2, "report_to": [], "use_cpu": True}
    defaults |= {"disable_tqdm": True, "save_strategy": "no", "logging_strategy": "no", "max_grad_norm": 0.0}
    defaults |= {"lr_scheduler_type": "constant", "dataloader_pin_memory": False}
    arguments = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    kwargs = {"base": base, "rho": RHO, **(optimizer or {}), "method": method or methods.SAM()}
    given = {"sam": {"rho": RHO}} if optimizer is None else {"optimizer_cls_and_kwargs": (FastSAM, kwargs)}
    given["eval_dataset"] = dataset(16) if "eval_strategy" in options else None
    trainer = Recorded(model, arguments, train_dataset=dataset(language=language), scale=scale, **given)
    if not language:  # Trainer takes it that every model's loss is divided by the number of items; BERT's is not
        trainer.loss_is_scaled_for_ga = False
    return trainer


def mean_loss(model, batches, batch):
    return model(**batch).loss / len(batches)


def token_loss(model, batches, batch):
    """Each token of the step has the same weight; counted as Trainer does for GPT-2, whose ``loss_type`` is not set."""
    tokens = sum(b["labels"].ne(-100).sum() for b in batches)
    return model(**batch, num_items_in_batch=tokens).loss


def smoothed_loss(model, batches, batch):
    return F.cross_entropy(model(**batch).logits, batch["labels"], label_smoothing=0.1) / len(batches)


def train_by_hand(
    model, steps, *, loss=mean_loss, clip=None, autocast=None, scale=1.0, options=SGD, schedule=None, **kwargs
):
    """``schedule`` makes of the base a function that is called after each step."""
    model.train()
    sam = HandWrittenSAM(model.parameters(), **options, **kwargs)
    schedule = schedule and schedule(sam.base)
    for batches in steps:

        def add_gradients(batches=batches):
            for batch in batches:
                with autocast or nullcontext():
                    value = loss(model, batches, batch)
                (scale * value).backward()
            for param in model.parameters():
                if param.grad is not None:
                    param.grad /= scale

        sam.step(add_gradients, clip=clip)
        if schedule:
            schedule()
    return model


FLOAT16 = {"scale": SCALE, "autocast": torch.autocast("cpu", torch.float16)}
MODES = {
    "float32": ({}, {}),
    "accumulation": ({"gradient_accumulation_steps": 2}, {}),
    "accumulation, the last step of 1": ({"gradient_accumulation_steps": 3}, {}),
    "max_grad_norm": ({"max_grad_norm": CLIP}, {"clip": by_norm(CLIP)}),
    "accumulation, max_grad_norm": ({"gradient_accumulation_steps": 2, "max_grad_norm": CLIP}, {"clip": by_norm(CLIP)}),
    "label smoothing": ({"label_smoothing_factor": 0.1}, {"loss": smoothed_loss}),
    "gradient checkpointing": ({"gradient_checkpointing": True}, {}),
    "torch_compile": ({"torch_compile": True, "torch_compile_backend": "aot_eager"}, {}),
    "bf16": ({"bf16": True}, {"autocast": torch.autocast("cpu", torch.bfloat16)}),
    "fp16 with a scaler": ({"scale": SCALE}, {**FLOAT16}),
    "fp16 with a scaler, accumulation, max_grad_norm": (
        {"scale": SCALE, "gradient_accumulation_steps": 2, "max_grad_norm": CLIP},
        {**FLOAT16, "clip": by_norm(CLIP)},
    ),
}


@pytest.mark.parametrize("mode", MODES)
def test_classification(table, tmp_path, mode):
    given, expected = MODES[mode]
    trainer = trainer_of(tmp_path, bert(), **given)
    trainer.train()
    assert not trainer.optimizer.optimizer.perturbed
    table.compare("Transformers", mode, trainer.model, train_by_hand(bert(), trainer.steps, **expected))


def test_a_schedule_with_warm_up(table, tmp_path):
    trainer = trainer_of(tmp_path, bert(), lr_scheduler_type="linear", warmup_steps=2)
    trainer.train()
    schedule = lambda base: get_linear_schedule_with_warmup(base, 2, len(trainer.steps)).step  # noqa: E731
    table.compare(
        "Transformers", "linear schedule", trainer.model, train_by_hand(bert(), trainer.steps, schedule=schedule)
    )


def test_a_plateau_of_the_evaluated_loss(table, tmp_path):
    plateau, model = {"factor": 0.5, "patience": 0, "threshold": 1e-3}, bert()
    evaluates = {"eval_strategy": "steps", "eval_steps": 1, "per_device_eval_batch_size": 8}
    options = {"lr_scheduler_type": "reduce_lr_on_plateau", "lr_scheduler_kwargs": plateau, **evaluates}
    trainer = trainer_of(tmp_path, bert(), **options)
    trainer.train()
    samples = dataset(16)
    batch = {name: torch.stack([sample[name] for sample in samples]) for name in samples[0]}
    rates = []

    def evaluation(base):
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(base, **plateau)

        def evaluate():
            with torch.no_grad():
                schedule.step(model.eval()(**batch).loss.item())
            model.train()
            rates.append(base.param_groups[0]["lr"])

        return evaluate

    train_by_hand(model, trainer.steps, schedule=evaluation)
    assert 0.1 > rates[-1] == trainer.optimizer.param_groups[0]["lr"]
    table.compare("Transformers", "ReduceLROnPlateau", trainer.model, model)


def test_a_language_model_with_unlike_numbers_of_tokens(table, tmp_path):
    trainer = trainer_of(tmp_path, gpt2(), language=True, gradient_accumulation_steps=2)
    trainer.train()
    expected = train_by_hand(gpt2(), trainer.steps, loss=token_loss)
    table.compare("Transformers", "GPT-2, accumulation, num_items_in_batch", trainer.model, expected)


def test_the_optimizer_of_the_training_arguments_becomes_the_base(table, tmp_path):
    trainer = trainer_of(tmp_path, bert(), optimizer=None, learning_rate=1e-3, weight_decay=0.1)
    trainer.train()
    base = trainer.optimizer.optimizer.base_optimizer
    assert isinstance(base, torch.optim.AdamW)
    assert [group["weight_decay"] for group in base.param_groups] == [0.1, 0.0]
    model = bert()
    decayed = set(trainer.get_decay_parameter_names(model))
    sam = [{"params": [p for n, p in model.named_parameters() if (n in decayed) == d]} for d in (True, False)]
    sam[0]["weight_decay"], sam[1]["weight_decay"] = 0.1, 0.0
    flat = [p for group in sam for p in group["params"]]
    by_hand = HandWrittenSAM(flat, base=lambda _, **options: torch.optim.AdamW(sam, **options), lr=1e-3)
    model.train()
    for batches in trainer.steps:
        by_hand.step(lambda batches=batches: [mean_loss(model, batches, b).backward() for b in batches])
    table.compare("Transformers", "sam={...} over TrainingArguments", trainer.model, model)


@pytest.mark.parametrize("method", [methods.GSAM(), methods.MomentumSAM(), methods.SAM(inner_steps=2)], ids=str)
def test_methods(table, tmp_path, method):
    given = {"gradient_accumulation_steps": 2, "max_grad_norm": CLIP, "scale": SCALE}
    trainer = trainer_of(tmp_path, bert(), method=method, **given)
    trainer.train()
    model = bert().train()
    optimizer = FastSAM(model.parameters(), rho=RHO, method=method, **SGD)
    options = {"scaler": torch.amp.GradScaler("cpu", init_scale=SCALE), "autocast": FLOAT16["autocast"]}
    for batches in trainer.steps:
        sam_step(model, lambda m, batch: m(**batch).loss, batches, optimizer, max_grad_norm=CLIP, **options)
    mode = f"{type(method).__name__}, fp16 with a scaler, accumulation, max_grad_norm"
    table.compare("Transformers", mode, trainer.model, model)


def test_resume(table, tmp_path):
    trainer = trainer_of(tmp_path, bert(), save_strategy="epoch", gradient_accumulation_steps=2)
    trainer.train()
    resumed = trainer_of(tmp_path, bert(), gradient_accumulation_steps=2)
    first = min(os.listdir(tmp_path), key=lambda name: int(name.rpartition("-")[2]))
    resumed.train(resume_from_checkpoint=str(tmp_path / first))
    expected = train_by_hand(bert(), trainer.steps)
    table.compare("Transformers", "resume", resumed.model, expected)


def test_the_first_passs_loss_is_logged(tmp_path):
    trainer = trainer_of(tmp_path, bert(), logging_strategy="steps", logging_steps=1, num_train_epochs=1)
    trainer.train()
    with torch.no_grad():
        expected = float(bert().train()(**trainer.steps[0][0]).loss)
    logged = trainer.state.log_history[0]
    assert logged["loss"] == pytest.approx(expected, abs=1e-4)
    assert logged["sharpness"] == pytest.approx(logged["perturbed_loss"] - expected, abs=1e-4)
    assert logged["sharpness"] > 0


def test_an_exception_restores_the_weights(tmp_path):
    model = bert()
    trainer = trainer_of(tmp_path, model, method=methods.RandomSAM(), gradient_accumulation_steps=2)
    before = copy.deepcopy(model.state_dict())
    step = partial(SAMTrainer.training_step, trainer)

    def fails(*args, **kwargs):
        step(*args, **kwargs)
        assert trainer.optimizer.optimizer.perturbed
        raise KeyError("mine")

    trainer.training_step = fails
    with pytest.raises(KeyError, match="mine"):
        trainer.train()
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


def test_another_optimizer_is_refused(tmp_path):
    trainer = trainer_of(tmp_path, bert())
    trainer.optimizer_cls_and_kwargs = (torch.optim.SGD, {"lr": 0.1})
    with pytest.raises(TypeError, match="must be FastSAM, got SGD"):
        trainer.train()


def test_fp16(table):
    table.not_run("Transformers", "fp16 on a GPU", "needs a GPU; see 'fp16 with a scaler' on the CPU")
