"""The chart of pruning on language models: a small one made here, and ones that it has to refuse."""

import numpy as np
import pytest
import torch

from theodolite.core.masks import prune_units, remove_units
from theodolite.core.next_token import next_tokens
from theodolite.core.subject import Dataset, Rows, Subject
from theodolite.parameters.relevance_pruning import unit_scores
from theodolite.survey.chart import Budget, load_charts

transformers = pytest.importorskip("transformers")
SIZES = {"vocab_size": 50, "hidden_size": 24, "intermediate_size": 20, "num_hidden_layers": 2, "num_attention_heads": 4}


def subject(model, texts=10):
    generator = torch.Generator().manual_seed(0)

    def rows(n):
        return Rows(torch.randint(3, 50, (n, 12), generator=generator), torch.arange(n) % texts)

    data = Dataset("tokens", "text", "language", rows(60), rows(40), rows(40))
    return Subject("small", data, model.eval())


@pytest.fixture(scope="module")
def small():
    torch.manual_seed(0)
    return subject(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.3)))


def test_its_numbers_are_those_of_the_smaller_model(small):
    chart = load_charts()["relevance-pruning"]
    assert chart.needs.refusal(small) is None
    assert chart.cost(small) > 0
    before = {name: value.clone() for name, value in small.predictor.state_dict().items()}
    finding = chart.draw(small, Budget())
    references, rows = small.data.train.x[:8], small.data.test.x[:12]
    whole = next_tokens(small.predictor, rows).loss.double().mean()
    for words, options in {
        "relevance": {"abs": True},
        "size of the weights": {"criterion": "weight"},
        "Taylor expansion": {"criterion": "taylor"},
        "chance": {"criterion": "random"},
    }.items():
        scores = unit_scores(small.predictor, (references, references), **options)
        smaller = remove_units(small.predictor, prune_units(small.predictor, scores, amount=0.2), rows)
        found = finding.numbers[f"loss added by {words}, 20% of the units removed"]
        assert found.value == pytest.approx(float(next_tokens(smaller, rows).loss.double().mean() - whole), abs=1e-5)
        assert found.low < found.value < found.high
    assert {control.kind for control in finding.comparison.controls} == {"closed-form", "random"}
    assert finding.numbers["units in the MLPs"].value == 40
    assert "40 MLP units" in finding.headline
    assert finding.to_json()["headline"] == chart.draw(small, Budget()).headline
    assert all(torch.equal(value, before[name]) for name, value in small.predictor.state_dict().items())


def test_of_a_single_text_the_rows_are_what_varies():
    torch.manual_seed(0)
    one = subject(transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES, initializer_range=0.3)), texts=1)
    finding = load_charts()["relevance-pruning"].draw(one, Budget())
    assert all(np.ptp((e.low, e.high)) > 0 for name, e in finding.numbers.items() if name.startswith("loss"))


def test_a_model_of_unknown_parts_is_refused_with_the_reason():
    needs = load_charts()["relevance-pruning"].needs
    gpt2 = transformers.GPT2LMHeadModel(transformers.GPT2Config(vocab_size=50, n_embd=24, n_layer=1, n_head=4))
    assert "no MLP of linear layers with names that are known" in str(needs.refusal(subject(gpt2)))
    neox = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**SIZES))
    assert "queries, keys and values in one layer" in str(needs.refusal(subject(neox)))
