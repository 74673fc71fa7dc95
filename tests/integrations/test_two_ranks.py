"""Two gloo ranks: each client trains as SAM by hand does on the data of both, and the ranks agree bit for bit."""

import pytest
import torch
import two_ranks
from setting import BATCH, by_norm, in_steps, make_loader, train_by_hand

# In the order of the ranks: gradients in 16 bits are rounded before they are added up over ranks.
PARTS = list(make_loader(batch_size=BATCH // two_ranks.WORLD))


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return two_ranks.run_all(tmp_path_factory.mktemp("ranks"))


def weights_of(model):
    params = model if isinstance(model, list) else model.parameters()
    return torch.cat([p.detach().flatten() for p in params])


@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulation"])
@pytest.mark.parametrize("case", two_ranks.CASES, ids=" ".join)
def test_two_ranks(table, results, case, accumulate):
    client, parallel = case
    answers = results[case, accumulate]
    for answer in answers:
        assert not isinstance(answer, str), answer
    if client == "Transformers":
        from test_transformers import gpt2, token_loss
        from test_transformers import train_by_hand as train_transformer

        models = [model for model, _ in answers]
        steps = [[b for rank in step for b in rank] for step in zip(*(steps for _, steps in answers), strict=True)]
        expected = train_transformer(gpt2(), steps, loss=token_loss)
    else:
        models = answers
        options = {"clip": by_norm(two_ranks.CLIP)} if "clipping" in parallel else {}
        if "scaler" in parallel:
            options |= {"scale": two_ranks.SCALE, "autocast": torch.autocast("cpu", torch.float16)}
        expected = train_by_hand(in_steps(PARTS, accumulate * two_ranks.WORLD), **options)
    assert torch.equal(*map(weights_of, models))
    table.compare(client, f"{parallel}, 2 ranks" + (accumulate > 1) * ", accumulation", models[0], expected)


def test_fsdp2_of_transformers(table):
    table.not_run("Transformers", "FSDP2", "needs GPUs; Accelerate's part of it ran, see Accelerate")
