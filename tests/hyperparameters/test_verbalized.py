"""The loop against a real HTTP server that answers by a rule: it checks the algorithm and is no result about a language model."""

import dataclasses
import itertools
import re
import threading

import numpy as np
import pandas as pd
import pytest
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import FunctionTransformer

from language_server import protocol_server
from theodolite.core.errors import DataError, InputError
from theodolite.hyperparameters.verbalized import (
    NO_FORMULA,
    Candidate,
    LearnerFormatError,
    OptimizerFormatError,
    VerbalizedClassifier,
    VerbalizedRegressor,
    candidate_search,
    in_context,
    reference_scores,
    training_report,
)
from theodolite.hyperparameters.verbalized.prompts import REGRESSION
from theodolite.language import connect
from theodolite.language.model import EndpointError, EndpointUnavailable

SLOPE = re.compile(r"slope (-?[\d.]+), intercept (-?[\d.]+)")


def section(text, name):
    return re.search(rf"\*\* {re.escape(name)}[^\n]*: \*\*\n(.*?)(?=\n\n|$)", text, re.DOTALL)[1]


def rule(messages):
    """A learner that follows a slope and an intercept, and an optimizer that fits them to the batch."""
    text = messages[-1]["content"]
    if "** The target outputs: **" not in text:
        found = SLOPE.findall(section(text, "Pattern Descriptions"))
        slope, intercept = map(float, found[-1]) if found else (0.0, 0.0)
        x = float(section(text, "Input").strip("[]"))
        return f"Explanations: {slope} times {x} plus {intercept}.\n\n**Output:** [{slope * x + intercept:.2f}]"
    x, y = (
        np.array([float(line.strip("[]")) for line in section(text, name).splitlines()])
        for name in ("Inputs", "The target outputs")
    )
    slope, intercept = np.polyfit(x, y, 1)
    return f"Reasoning: a straight line.\n\nNew Pattern Descriptions: slope {slope:.4f}, intercept {intercept:.4f}"


def line(n=100, seed=0):
    rng = np.random.default_rng(seed)
    x = rng.uniform(0, 2, n).round(2)
    return x[:, None], (4 + 3 * x + 0.1 * rng.normal(size=n)).round(2)


def ask(server, tmp_path=None, **options):
    return connect(server.url, "m", cache=False if tmp_path is None else tmp_path / "answers.sqlite", **options)


def chats(server):
    """The conversations that were held: the learner's, and the optimizer's."""
    asked = [body["messages"] for _, body, _ in server.seen]
    return [one for one in asked if len(one) == 1], [one for one in asked if one[0]["role"] == "system"]


@pytest.fixture(scope="module")
def trained():
    X, y = line()
    with protocol_server(answer=rule) as server:
        model = VerbalizedRegressor(ask(server), prior="The relation is simple.").fit(X, y)
    return model, server, X, y


def test_the_loop_is_the_algorithm(trained):
    model, server, X, y = trained
    learner, optimizer = chats(server)
    assert (len(learner), len(optimizer)) == (500, 50)
    assert model.calls_ == 550
    assert model.tokens_ == 550 * 10
    assert VerbalizedRegressor(model.learner).forecast_calls(100) == 550
    assert all(len(one) <= 4 for one in learner + optimizer)
    theta_0 = f"{REGRESSION} The relation is simple."
    assert model.theta_initial_ == theta_0
    for (message,) in learner:
        assert section(message["content"], "Pattern Descriptions").startswith(theta_0)
    for t, (update, one) in enumerate(zip(model.history_, optimizer, strict=True)):
        rows = slice(10 * (t % 10), 10 * (t % 10) + 10)
        assert update.batch == tuple(range(100))[rows]
        assert (update.step, update.epoch) == (t + 1, t // 10 + 1)
        assert section(one[-1]["content"], "Inputs") == "\n".join(f"[{v:.12g}]" for v in X[rows, 0])
        assert section(one[-1]["content"], "The target outputs") == "\n".join(f"[{v:.2f}]" for v in y[rows])
        assert section(one[-1]["content"], "Current Pattern Descriptions").startswith(theta_0)
        assert "loss" not in one[-1]["content"]


def test_the_optimizer_sees_its_last_step_and_no_more(trained):
    _, server, _, _ = trained
    optimizer = chats(server)[1]
    assert [message["role"] for message in optimizer[0]] == ["system", "user"]
    for before, now in itertools.pairwise(optimizer):
        assert [message["role"] for message in now] == ["system", "user", "assistant", "user"]
        assert now[0] == optimizer[0][0]
        assert now[1] == before[-1]
        assert now[2]["content"] == rule(before)


def test_it_fits_as_least_squares_on_the_last_batch(trained):
    model, _, X, y = trained
    inside = np.linspace(0, 2, 40)
    truth = 4 + 3 * inside
    slope, intercept = map(float, SLOPE.findall(model.theta_)[0])
    closed = np.polyval(np.polyfit(X[90:, 0], y[90:], 1), inside)
    with protocol_server(answer=rule) as server:
        again = clone(model).set_params(learner=ask(server))
        first = again.predict(inside[:, None])
        again.theta_ = model.theta_  # descriptions can be edited
        answers = again.predict(inside[:, None])
        assert again.score(inside[:, None], truth) > 0.99
    assert answers == pytest.approx(slope * inside + intercept, abs=0.02)
    assert np.mean((first - truth) ** 2) >= 1
    assert np.mean((answers - truth) ** 2) <= 0.02
    assert abs(np.mean((answers - truth) ** 2) - np.mean((closed - truth) ** 2)) <= 0.005


def test_every_update_can_be_read(trained):
    model = trained[0]
    for update in model.history_:
        assert update.reasoning == "a straight line."
        assert SLOPE.search(update.theta_after)
        assert update.accepted
        assert update.calls == 11
        assert update.loss_after_validation is None
    assert model.history_[0].theta_before == model.theta_initial_
    assert model.history_[0].loss_before > 10 > 0.1 > model.history_[-1].loss_before
    assert all(one.theta_after == two.theta_before for one, two in itertools.pairwise(model.history_))
    assert model.theta_ == model.best_theta_ == model.history_[-1].theta_after
    with pytest.raises(dataclasses.FrozenInstanceError):
        model.history_[0].step = 2
    page = training_report(model)
    assert page.count("<tr>") == 51
    assert "a straight line." in page
    assert "<ins>" in page


@pytest.mark.parametrize("history", [0, 1, 2])
def test_the_window_is_as_long_as_asked(history):
    X, y = line(50)
    with protocol_server(answer=rule) as server:
        VerbalizedRegressor(ask(server), history=history, epochs=1, show_loss=True, instructions=NO_FORMULA).fit(X, y)
        optimizer = chats(server)[1]
    assert [len(one) for one in optimizer] == [2 + 2 * min(t, history) for t in range(5)]
    assert all("** The loss: **" in one[-1]["content"] for one in optimizer)
    assert all(NO_FORMULA in one[0]["content"] for one in optimizer)


def test_a_second_fit_is_the_same_and_asks_nothing(tmp_path):
    X, y = line(40)
    with protocol_server(answer=rule) as server:
        first = VerbalizedRegressor(ask(server, tmp_path), validation=0.25, epochs=2).fit(X, y)
        asked = len(server.seen)
        second = VerbalizedRegressor(ask(server, tmp_path), validation=0.25, epochs=2).fit(X, y)
        assert len(server.seen) == asked
        other = VerbalizedRegressor(ask(server, tmp_path), validation=0.25, epochs=2, seed=1).fit(X, y)
        assert len(server.seen) > asked  # the seed is part of what an answer is kept under
    assert first.history_ == second.history_ != other.history_
    assert first.calls_ == second.calls_ == first.forecast_calls(40)


def test_a_fit_that_was_killed_goes_on(tmp_path):
    x = np.random.default_rng(0).permutation(300) / 150  # all different: equal rows of a batch would be asked for once
    X, y = x[:, None], 4 + 3 * x
    with protocol_server(answer=rule) as server:
        whole = VerbalizedRegressor(ask(server), epochs=1).fit(X, y)

    with protocol_server(*["ok"] * 220, *[400] * 20, answer=rule) as server:
        stopped = VerbalizedRegressor(ask(server, tmp_path), epochs=1)
        with pytest.raises(EndpointError, match="400"):
            stopped.fit(X, y)
        assert stopped.history_ == whole.history_[:20]
        assert stopped.theta_ == whole.history_[19].theta_after
    # another address would be another model: the server comes back at the same one
    port = int(server.url.rsplit(":", 1)[1].split("/")[0])
    with protocol_server(answer=rule, port=port) as server:
        resumed = VerbalizedRegressor(ask(server, tmp_path), epochs=1).fit(X, y)
        assert len(server.seen) == 110
    assert resumed.history_ == whole.history_


def test_rows_set_aside_choose_and_worse_descriptions_are_refused():
    X, y = line(60)
    good = "Reasoning: r.\nNew Pattern Descriptions: slope 3, intercept 4"
    bad = "Reasoning: r.\nNew Pattern Descriptions: slope 9, intercept 9"

    def run(accept):
        written = iter([good, bad, bad, bad])

        def answer(messages):
            return next(written) if messages[0]["role"] == "system" else rule(messages)

        with protocol_server(answer=answer) as server:
            model = VerbalizedRegressor(ask(server), accept=accept, validation=1 / 3, epochs=1).fit(X, y)
            seen = {tuple(map(float, row)) for one in chats(server)[1] for row in _pairs(one[-1]["content"])}
        return model, seen

    always, seen = run("always")
    careful, _ = run("if-better")
    assert [one.accepted for one in always.history_] == [True] * 4
    assert [one.accepted for one in careful.history_] == [True, False, False, False]
    assert always.history_[-1].theta_after == "slope 9, intercept 9"
    assert {one.theta_after for one in careful.history_} == {"slope 3, intercept 4"}
    assert always.theta_ == always.best_theta_ == careful.theta_ == "slope 3, intercept 4"
    assert careful.history_[0].loss_after_validation < 0.1 < careful.loss_initial_validation_
    shown = sorted(position for one in careful.history_ for position in one.batch)
    assert len(shown) == 40
    aside = sorted(set(range(60)) - set(shown))
    assert not {(X[i, 0], y[i]) for i in aside} & seen  # the optimizer never sees a row that judges
    assert [position for one in careful.history_ for position in one.batch] == shown  # in the order of the rows


def _pairs(text):
    return zip(
        *([row.strip("[]") for row in section(text, name).splitlines()] for name in ("Inputs", "The target outputs"))
    )


def test_the_budget_stops_a_fit_with_the_best_so_far():
    X, y = line(40)
    with protocol_server(answer=rule) as server:
        model = VerbalizedRegressor(ask(server), max_calls=25).fit(X, y)
        assert len(server.seen) == model.calls_ <= 25
    assert model.stopped_ == "budget"
    assert [one.step for one in model.history_] == [1, 2]
    assert model.theta_ == model.best_theta_ == model.history_[-1].theta_after
    with protocol_server(answer=rule) as server:
        none = VerbalizedRegressor(ask(server), max_calls=3).fit(X, y)
        assert server.seen == []
    assert none.theta_ == none.theta_initial_


def test_an_unreadable_answer_is_repaired_once_or_left_out():
    X, y = line(10)
    broken = {f"[{v:.12g}]" for v in X[:3, 0]}

    def answer(messages):
        text = messages[0]["content"]
        row = section(text, "Input") if len(messages) in (1, 3) else ""
        if row in broken and not (len(messages) == 3 and row == f"[{X[0, 0]:.12g}]"):
            return "I think that 7 is right."
        return rule(messages[:1] if len(messages) == 3 else messages)

    with protocol_server(answer=answer) as server:
        model = VerbalizedRegressor(ask(server), epochs=1).fit(X, y)
        repairs = [body["messages"] for _, body, _ in server.seen if len(body["messages"]) == 3]
        optimizer = chats(server)[1]
        with pytest.warns(UserWarning, match="2 of 10"):
            answers = model.predict(X)
        with pytest.warns(UserWarning, match="2 of 10"):
            assert np.isfinite(model.score(X, y))
        assert np.isfinite(model.loss(X, y))
    assert len(repairs) == 3
    assert all("one real number rounded to 2 decimals" in one[-1]["content"] for one in repairs)
    assert model.unparsed_ == 2
    assert np.isnan(answers).tolist() == [False, True, True, *[False] * 7]
    assert len(section(optimizer[0][-1]["content"], "Inputs").splitlines()) == 8
    assert len(section(optimizer[0][-1]["content"], "The target outputs").splitlines()) == 8


def test_answers_that_are_mostly_unreadable_end_the_run():
    X, y = line(10)
    with protocol_server(answer=lambda _: "Well, 7.") as server:
        model = VerbalizedRegressor(ask(server))
        with pytest.raises(LearnerFormatError, match=r"10 of 10 .*'Well, 7\.' and 'Well, 7\.'"):
            model.fit(X, y)
        assert len(server.seen) == 20  # each was asked for twice, and no more


def test_an_optimizer_without_the_section_is_counted_and_then_ends_the_run():
    X, y = line(60)
    written = iter(["no", "no", "Reasoning: r\nNew Pattern Descriptions: slope 3, intercept 4", "no", "no", "no"])

    def answer(messages):
        return next(written) if messages[0]["role"] == "system" else rule(messages)

    with protocol_server(answer=answer) as server:
        model = VerbalizedRegressor(ask(server), epochs=1)
        with pytest.raises(OptimizerFormatError, match="3 times in a row"):
            model.fit(X, y)
    assert model.failed_updates_ == 5
    assert [one.accepted for one in model.history_] == [False, False, True, False, False]
    assert [one.reasoning for one in model.history_] == ["no", "no", "r", "no", "no"]
    assert model.history_[1].theta_after == model.theta_initial_
    assert model.theta_ == "slope 3, intercept 4"


def test_descriptions_that_are_too_long_are_cut_with_a_warning():
    X, y = line(10)

    def answer(messages):
        if messages[0]["role"] == "system":
            return "Reasoning: r\nNew Pattern Descriptions: slope 3, intercept 4" + " and so on" * 100
        return rule(messages)

    with protocol_server(answer=answer) as server, pytest.warns(UserWarning, match="cut to max_theta_chars=50"):
        model = VerbalizedRegressor(ask(server), epochs=1, max_theta_chars=50).fit(X, y)
    assert len(model.theta_) == 50


def test_endpoints_that_refuse_or_fail():
    X, y = line(10)
    with protocol_server(401, answer=rule) as server, pytest.raises(EndpointError, match="401"):
        VerbalizedRegressor(ask(server, concurrency=1)).fit(X[:1], y[:1])
    assert len(server.seen) == 1
    with protocol_server(429, 503, answer=rule) as server:
        VerbalizedRegressor(ask(server), epochs=1).fit(X, y)
        assert len(server.seen) == 13
    with protocol_server(*[503] * 9, answer=rule) as server, pytest.raises(EndpointUnavailable):
        VerbalizedRegressor(ask(server, retries=0, concurrency=1), prior="p").predict(X[:1])


def test_a_batch_is_asked_for_at_once():
    X, _ = line(10)
    inside, most = [0], [0]

    def answer(messages):
        inside[0] += 1
        most[0] = max(most[0], inside[0])
        barrier.wait(10)
        inside[0] -= 1
        return rule(messages)

    barrier = threading.Barrier(10)
    with protocol_server(answer=answer) as server:
        VerbalizedRegressor(ask(server, concurrency=10), task="Predict.").predict(X)
    assert most[0] == 10


def test_theta_0_alone_predicts_where_it_was_given():
    X, _ = line(3)
    with protocol_server(answer=rule) as server:
        with pytest.raises(NotFittedError, match="task or prior"):
            VerbalizedRegressor(ask(server)).predict(X)
        told = VerbalizedRegressor(ask(server), prior="A line with slope 3, intercept 4.")
        assert told.predict(X) == pytest.approx(4 + 3 * X[:, 0], abs=0.01)
        with pytest.raises(NotFittedError, match="labels"):
            VerbalizedClassifier(ask(server), prior="p").predict(["a b"])


def classes(messages):
    """A learner that says "high" above the threshold that it is told; an optimizer that writes one."""
    text = messages[-1]["content"]
    if messages[0]["role"] == "system":
        return "Reasoning: split.\nNew Pattern Descriptions: high above 5"
    found = re.findall(r"above (\d+)", section(text, "Pattern Descriptions"))
    value = float(re.search(r"size: ([\d.]+)", section(text, "Input"))[1])
    return f"Explanations: compared.\nOutput: {'High' if found and value > float(found[-1]) else 'low'}"


def table(n=40):
    size = np.random.default_rng(0).integers(0, 11, n)
    return pd.DataFrame({"size": size, "name": "x"}), np.where(size > 5, "high", "low")


def test_a_classifier_learns_classes_of_a_table():
    X, y = table()
    with protocol_server(answer=classes) as server:
        model = VerbalizedClassifier(ask(server), epochs=1, validation=0.25, accept="if-better").fit(X, y)
        assert model.predict(X).tolist() == y.tolist()
        assert model.score(X, y) == 1
        asked = chats(server)
        with pytest.raises(DataError, match="another form"):
            model.predict(X[["size"]])
        with pytest.raises(AttributeError):
            model.predict_proba(X)
    assert list(model.classes_) == ["high", "low"]
    assert "exactly one of: high, low" in asked[0][0][0]["content"]
    assert "size: 9, name: x" in asked[1][0][1]["content"]
    assert set(section(asked[1][0][1]["content"], "The target outputs").splitlines()) == {"high", "low"}
    assert model.history_[0].loss_before > 0
    assert model.history_[-1].loss_before == 0


def test_numbers_as_classes_and_other_words_for_them():
    X, y = table()
    with protocol_server(answer=classes) as server:
        model = VerbalizedClassifier(ask(server), labels=["low", "high"], epochs=1).fit(X, (y == "high").astype(int))
        assert model.predict(X).tolist() == (y == "high").tolist()
        assert model.predict(X).dtype.kind == "i"


def test_an_unreadable_class_is_none_and_wrong():
    X, y = table(10)

    def answer(messages):
        return "?" if "size: 10" in messages[0]["content"] else classes(messages)

    X.loc[0, "size"] = 10
    with protocol_server(answer=answer) as server:
        model = VerbalizedClassifier(ask(server), prior="high above 5", epochs=0).fit(X, y)
        with pytest.warns(UserWarning, match="could not be read"):
            found = model.predict(X)
        with pytest.warns(UserWarning, match="could not be read"):
            assert model.score(X, y) < 1
    assert found[0] is None


def test_scores_are_of_whole_labels_with_one_space_before_each():
    with protocol_server() as server:  # log p of a word is minus its length, the space included
        model = VerbalizedClassifier(
            ask(server), mode="score", prior="p.", labels=["a", "so good"], epochs=0, cue="Class"
        )
        model.fit(["x y", "z"], [0, 1])
        p = model.predict_proba(["some text"])
        prompts = {body["prompt"] for _, body, _ in server.seen}
        assert model.predict(["some text"]).tolist() == [0]
    log = np.array([-2.0, -3.0 - 5.0])
    assert p == pytest.approx(np.exp(log)[None] / np.exp(log).sum())
    assert prompts == {f"{model.theta_initial_}\nInput: some text\nClass:{end}" for end in (" a", " so good")}


def test_scoring_learns_by_the_optimizer_too():
    with protocol_server(answer=classes) as server:
        model = VerbalizedClassifier(ask(server), mode="score", epochs=1, batch_size=2).fit(
            ["a", "b", "c"], ["u", "v", "u"]
        )
        assert model.calls_ == 5
        assert model.theta_ == "high above 5"


def test_candidates_are_chosen_by_their_loss():
    X, y = table()
    with protocol_server(answer=classes) as server:
        model = VerbalizedClassifier(ask(server), epochs=3)
        found = candidate_search(model, X, y, ["no idea", "high above 8", "high above 5", Candidate("high above 2")])
        assert found.chosen == 2
        assert found.losses[2] == 0 < min(np.delete(found.losses, 2))
        assert found.calls == len(server.seen) == 160
        assert found.model.predict(X).tolist() == y.tolist()
        called = len(server.seen)
        written = candidate_search(model, X, y, k=3)
        assert written.calls == len(server.seen) - called == 10 + 3 + 3 * 30
        temperatures = [
            body["temperature"] for _, body, _ in server.seen[called:] if body["messages"][0]["role"] == "system"
        ]
        seeds = {body["seed"] for _, body, _ in server.seen[called:] if body["messages"][0]["role"] == "system"}
        assert (temperatures, seeds) == ([1.0] * 3, {0, 1, 2})
        with pytest.raises(InputError, match="no candidates"):
            candidate_search(model, X, y, [])
        with pytest.raises(DataError, match="more than batch_size"):
            candidate_search(model, X[:10], y[:10])
    silent = protocol_server(answer=lambda m: "?" if m[0]["role"] == "system" else classes(m))
    with silent as server, pytest.raises(OptimizerFormatError, match="none of 2"):
        candidate_search(VerbalizedClassifier(ask(server)), X, y, k=2)


def test_a_candidate_may_call_the_classes_otherwise():
    with protocol_server() as server:
        model = VerbalizedClassifier(ask(server), mode="score", task="Say it.")
        found = candidate_search(
            model, ["t u", "v w"], [1, 1, 0][1:], ["Say it.", Candidate("Well?", ("long", "s"), "Kind")]
        )
        assert found.losses.tolist() == [0.5, 0.5]  # "0" and "1" are of one length: the first
        assert found.model.theta_ == "Say it."
        ends = {body["prompt"].rsplit("\n", 1)[1] for _, body, _ in server.seen}
    assert ends == {"Label: 0", "Label: 1", "Kind: long", "Kind: s"}


def test_examples_stand_in_place_of_descriptions():
    X, y = line(5)
    with protocol_server(answer=rule) as server:
        model = in_context(VerbalizedRegressor(ask(server), prior="slope 1, intercept 1"), X, y)
        model.predict(X[:1])
        (learner,) = chats(server)[0]
    text = learner[0]["content"]
    assert f"Input: [{X[4, 0]:.12g}]\nOutput: [{y[4]:.2f}]" in text
    assert text.count("Output: [") == 6
    assert model.theta_initial_ in text


def test_ordinary_models_on_the_same_rows():
    X, y = line(80)
    found = reference_scores(X[:40], y[:40], X[40:], y[40:], regression=True)
    assert found["linear regression"].value < 0.03 < 1 < found["mean"].value
    assert set(found) == {"mean", "linear regression", "polynomial regression", "gradient boosting"}
    frame, kind = table(80)
    found = reference_scores(frame[:40], kind[:40], frame[40:], kind[40:])
    assert found["gradient boosting"].value == 1
    found = reference_scores(["a b", "c d"] * 9, [0, 1] * 9, ["a", "d"], [0, 1])
    assert found["logistic regression on word counts"].value == 1
    assert found["commonest class"].value == 0.5


def test_it_is_a_scikit_learn_estimator():
    X, y = line(20)
    with protocol_server(answer=rule) as server:
        model = VerbalizedRegressor(ask(server), epochs=1, prior="p")
        copy = clone(model)
        assert copy.get_params() == model.get_params()
        assert copy.learner is model.learner
        pipeline = make_pipeline(FunctionTransformer(np.round, kw_args={"decimals": 1}), model)
        assert pipeline.fit(X, y).score(X, y) > 0.9
        assert clone(pipeline).get_params()["verbalizedregressor__prior"] == "p"


def test_what_was_written_cannot_run_in_the_report():
    X, y = line(10)
    evil = "<script>alert(1)</script> & slope 3, intercept 4"

    def answer(messages):
        return (
            f"Reasoning: {evil}\nNew Pattern Descriptions: {evil}"
            if messages[0]["role"] == "system"
            else rule(messages)
        )

    with protocol_server(answer=answer) as server:
        model = VerbalizedRegressor(ask(server), epochs=1, prior="<b>").fit(X, y)
        with pytest.raises(InputError, match="not fitted"):
            training_report(clone(model))
    page = training_report(model)
    assert "<script" not in page
    assert "<b></p>" not in page
    assert "&lt;script&gt;" in page


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"batch_size": 0}, "batch_size"), ({"epochs": -1}, "epochs"), ({"history": 3}, "0, 1 or 2"),
        ({"accept": "no"}, "if-better"),
        ({"accept": "if-better"}, "give validation"), ({"validation": 1.0}, "share"), ({"mode": "x"}, "generate"),
        ({"max_calls": 0}, "max_calls"), ({"decimals": -1}, "decimals"), ({"mode": "score"}, "compares labels"),
        ({"validation": 0.01}, "leaves a part empty"), ({"optimizer": "gpt"}, "optimizer must be"),
    ],
)  # fmt: skip
def test_options_that_cannot_be(options, told):
    X, y = line(10)
    with pytest.raises(InputError, match=told):
        VerbalizedRegressor(connect(cache=False), **options).fit(X, y)


@pytest.mark.parametrize(
    ("y", "told"),
    [(["a"] * 10, "numbers"), ([1.0] * 9, "10 finite"), ([np.nan] * 10, "10 finite"), (np.zeros((10, 2)), "10 finite")],
)
def test_targets_that_cannot_be(y, told):
    with pytest.raises(DataError, match=told):
        VerbalizedRegressor(connect(cache=False)).fit(line(10)[0], y)


def test_classes_that_cannot_be():
    model = VerbalizedClassifier(connect(cache=False), prior="p")
    with pytest.raises(DataError, match="one class"):
        model.fit(["a", "b"], ["u", "u"])
    with pytest.raises(DataError, match="missing"):
        model.fit(["a", "b"], ["u", None])
    with pytest.raises(DataError, match="3 classes"):
        model.fit(["a", "b", "c"], ["u", "v"])
    for labels, told in (
        (("x",), "1 labels for 2"),
        ("xy", "words"),
        (("x", "X"), "all different"),
        (("", "y"), "words"),
    ):
        with pytest.raises(InputError, match=told):
            clone(model).set_params(labels=labels).fit(["a", "b"], ["u", "v"])
    with pytest.raises(InputError, match="cue"):
        clone(model).set_params(cue=" ").fit(["a", "b"], ["u", "v"])
    with pytest.raises(DataError, match="images"):
        model.fit(np.zeros((2, 8, 8)), ["u", "v"])
    with pytest.raises(InputError, match="learner must be"):
        VerbalizedClassifier("gpt-4").fit(["a", "b"], ["u", "v"])


def test_scoring_counts_its_tokens_whether_the_model_or_its_cache_answers(tmp_path):
    from theodolite.language.model import AnswerCache
    from theodolite.language.scripted import ScriptedLanguageModel

    cache = AnswerCache(tmp_path / "answers.sqlite")
    llm = ScriptedLanguageModel(lambda prompt: "no section", log_probability=lambda prompt, text: -1.0, cache=cache)
    options = {"mode": "score", "epochs": 1, "prior": "Short.", "batch_size": 4}
    first = VerbalizedClassifier(llm, **options).fit(["a b", "c", "d", "e"], ["x", "y", "x", "y"])
    words = sum(len(f"{first.theta_initial_} Input: {row} Label:".split()) + 2 for row in ("a b", "c", "d", "e"))
    assert first.history_[0].tokens == first.tokens_ > words
    assert llm.usage.prompt_tokens + llm.usage.completion_tokens == first.tokens_
    again = VerbalizedClassifier(llm, **options).fit(["a b", "c", "d", "e"], ["x", "y", "x", "y"])
    assert again.history_ == first.history_
    assert llm.usage.prompt_tokens + llm.usage.completion_tokens == first.tokens_


def test_a_search_counts_repairs_and_tokens():
    texts = iter(["nothing", "Output: x", "Output: x", "Output: y"])
    from theodolite.language.scripted import ScriptedLanguageModel

    llm = ScriptedLanguageModel(lambda prompt: next(texts))
    found = candidate_search(VerbalizedClassifier(llm), ["a", "b", "c"], ["x", "y", "x"], ["A description."])
    assert found.calls == 4
    assert found.tokens == llm.usage.prompt_tokens + llm.usage.completion_tokens > 0
    with pytest.raises(InputError, match="k is how many"):
        candidate_search(VerbalizedClassifier(llm, batch_size=2), ["a", "b", "c"], ["x", "y", "x"], k=0)
