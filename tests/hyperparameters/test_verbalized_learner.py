"""A language model that is surveyed, as a learner of three small tables."""

import numpy as np
import pytest
from sklearn.datasets import load_breast_cancer, load_iris
from sklearn.tree import DecisionTreeClassifier
from tests.tiny_language_model import save_tiny_model, sentences

from theodolite.language.subjects import language_subject
from theodolite.survey.chart import Budget, load_charts
from theodolite.survey.hyperparameters import learner


@pytest.fixture(scope="module")
def subject(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    (folder / "texts.txt").write_text("\n".join(sentences(120)))
    return language_subject(save_tiny_model(folder / "model"), str(folder / "texts.txt"))


def test_a_rule_in_words_is_the_tree():
    x, y = load_iris(return_X_y=True)
    tree = DecisionTreeClassifier(max_leaf_nodes=3, random_state=0).fit(x[:, 2:], np.array(["A", "B", "C"])[y])
    said = learner._in_words(tree, ["petal length", "petal width"]).split(". ")
    assert len(said) == tree.get_n_leaves()
    assert said[0].startswith("If ")
    assert "and petal" in " ".join(said)
    answers = []
    for row in x[:, 2:]:
        values = {"petal length": row[0], "petal width": row[1]}
        for sentence in said:
            conditions, label = sentence.rstrip(".").removeprefix("If ").split(", it is ")
            met = []
            for one in conditions.split(" and "):
                name, limit = one.split(" is at most ") if "at most" in one else one.split(" is above ")
                met.append((values[name] <= float(limit)) == ("at most" in one))
            if all(met):
                answers.append(label)
    assert answers == tree.predict(x[:, 2:]).tolist()
    stump = DecisionTreeClassifier().fit(x[:10], ["A"] * 10)
    assert learner._in_words(stump, list("abcd")) == "It is always A."


def test_examples_test_rows_and_rule_share_no_row():
    task = learner._task(load_breast_cancer(), 0)
    assert len(task.examples) == learner._EXAMPLES
    assert len(task.test) == len(task.truth) == learner._TEST
    seen = {tuple(row) for row in task.examples.to_numpy()}
    assert seen.isdisjoint({tuple(row) for row in task.test.to_numpy()})
    assert set(task.labels) == set(task.truth) == {"A", "B"}
    assert task.question == "Is it A or B?"
    assert task.by_rule.mean() > 0.7


def test_a_short_context_is_told(subject):
    assert "128" in load_charts()["verbalized-learning"].needs.refusal(subject)


def test_a_model_that_knows_nothing_does_not_beat_its_controls(subject, monkeypatch):
    monkeypatch.setattr(subject.predictor.config, "max_position_embeddings", 4096)
    chart = load_charts()["verbalized-learning"]
    assert chart.needs.refusal(subject) is None
    finding = chart.draw(subject, Budget(seed=0))
    controls = {control.name: control for control in finding.comparison.controls}
    assert not finding.comparison.beats(controls["the commonest class"])
    assert controls["logistic regression on the same examples"].estimate.value > 0.7
    assert finding.comparison.estimate.n == 3 * learner._TEST
    assert "Do not use this model as a learner" in finding.advice
