"""Two gloo ranks: each client trains as SAM by hand does on the data of both, and the ranks agree bit for bit."""

import pytest
import torch
import two_ranks
from setting import in_steps, make_loader, train_by_hand

BATCHES = list(make_loader())


@pytest.fixture(scope="session")
def results(tmp_path_factory):
    return two_ranks.run_all(tmp_path_factory.mktemp("ranks"))


def weights_of(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


@pytest.mark.parametrize("accumulate", [1, 2], ids=["", "accumulation"])
@pytest.mark.parametrize("client", two_ranks.CASES)
def test_ddp(table, results, client, accumulate):
    answers = results[client, accumulate]
    for answer in answers:
        assert not isinstance(answer, str), answer
    if client == "Transformers":
        import test_transformers

        models = [model for model, _ in answers]
        steps = [[b for rank in step for b in rank] for step in zip(*(steps for _, steps in answers), strict=True)]
        expected = test_transformers.train_by_hand(test_transformers.bert(), steps)
    else:
        models = answers
        expected = train_by_hand(in_steps(BATCHES, accumulate))
    assert torch.equal(*map(weights_of, models))
    table.compare(client, "DDP, 2 ranks" + (accumulate > 1) * ", accumulation", models[0], expected)
