"""The examples with other libraries run."""

import runpy

from checkout import ROOT


def train(name, **options):
    return runpy.run_path(str(ROOT / "examples" / f"{name}.py"))["train"](**options)


def test_with_lightning():
    assert train("with_lightning", epochs=3, enable_progress_bar=False, enable_model_summary=False) > 0.5


def test_with_transformers():
    assert 0 < train("with_transformers", epochs=1, use_cpu=True, disable_tqdm=True) < 1


def test_with_timm():
    assert 0 < train("with_timm", epochs=1) < 1


def test_with_skorch():
    rho, accuracy = train("with_skorch", epochs=2, rhos=(0.05, 0.2))
    assert rho in (0.05, 0.2)
    assert accuracy > 0.3
