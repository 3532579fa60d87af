"""The language layer: one interface, a local model checked by brute force, an endpoint over real HTTP with its failures."""

import math
import os
import pickle
import shutil
import sqlite3
import threading
import time

import numpy as np
import pytest
import torch

from language_server import protocol_server
from theodolite.core.errors import InputError, ModelError
from theodolite.language import connect
from theodolite.language.endpoint import _read_chat, _read_echo
from theodolite.language.local import LocalModel
from theodolite.language.model import EndpointError, EndpointUnavailable, LogprobsUnavailable, ScoringUnavailable
from tiny_language_model import save_tiny_model

pytest.importorskip("transformers")
pytest.importorskip("openai")

ASK = [{"role": "user", "content": "one two three"}]


def endpoint(server, tmp_path=None, **options):
    return connect(server.url, "reverser", cache=tmp_path / "answers.sqlite" if tmp_path else False, **options)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


@pytest.fixture(scope="module")
def local(folder):
    return connect(model=folder, cache=False)


def by_hand(local, prompt, text):
    start = local.tokenizer(prompt)["input_ids"]
    ids = local.tokenizer(text, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        logp = local.model(torch.tensor([start + ids])).logits[0].double().log_softmax(-1)
    return sum(float(logp[len(start) + i - 1, token]) for i, token in enumerate(ids))


@pytest.mark.parametrize("memory", [None, 1])
def test_a_score_is_the_sum_over_the_continuations_tokens(folder, local, memory):
    texts = ["cat", "dog sat on the mat", "tree and then", "cat"]
    local._memory = memory
    found = local.score("the cat sat on", texts)
    assert found == pytest.approx([by_hand(local, "the cat sat on", text) for text in texts], abs=1e-5)
    assert found[0] == pytest.approx(found[3], abs=1e-6)


@pytest.mark.parametrize("memory", [None, 1])
def test_a_table_of_scores_has_the_rows_that_each_prompt_has_alone(local, memory):
    local._memory = memory
    prompts = ["the cat sat on", "the cat", "the cat sat on the mat and then", "dog", "the cat sat on"]
    for texts in (["cat", "dog", "tree"], ["cat", "dog sat on the mat", "dog sat"]):
        for wanted in (prompts, prompts[:3], prompts[:1]):
            found = local.score_table(wanted, texts)
            expected = [[by_hand(local, prompt, text) for text in texts] for prompt in wanted]
            assert found == pytest.approx(np.array(expected), abs=1e-5)


def test_a_table_asks_for_new_rows_only(folder, tmp_path):
    model = connect(model=folder, cache=tmp_path / "answers.sqlite")
    first = model.score_table(["the cat", "the dog"], ["sat", "mat"])
    assert model.usage.calls == 2
    again = model.score_table(["the dog", "the mat", "the cat"], ["sat", "mat"])
    assert (model.usage.calls, model.usage.cached) == (3, 2)
    assert again[[2, 0]] == pytest.approx(first, abs=0)
    assert model.score("the mat", ["sat", "mat"]) == pytest.approx(again[1], abs=0)


def test_tokens_of_a_text_have_their_probabilities_and_places(local):
    tokens = local.token_logprobs("the cat sat on the mat")
    assert tokens[0].logprob is None
    assert sum(token.logprob for token in tokens[1:]) == pytest.approx(
        by_hand(local, "the", "cat sat on the mat"), abs=1e-5
    )
    assert [token.start for token in tokens] == sorted(token.start for token in tokens)


def test_greedy_continuation_is_the_likeliest_token_each_time(local):
    (made,) = local.generate("the cat", max_tokens=6, logprobs=True)
    ids = local.tokenizer("the cat")["input_ids"]
    with torch.no_grad():
        for _ in range(made.completion_tokens):
            ids.append(int(local.model(torch.tensor([ids])).logits[0, -1].argmax()))
    assert local.tokenizer.decode(ids[2:]) == made.text
    assert "".join(token.text for token in made.tokens) == made.text
    assert made.prompt_tokens == 2


def test_drawn_continuations_repeat_with_the_seed_and_follow_the_probabilities(local):
    one = local.generate("the cat", 300, temperature=1.0, max_tokens=1, seed=3)
    assert [made.text for made in one] == [
        made.text for made in local.generate("the cat", 300, temperature=1.0, max_tokens=1, seed=3)
    ]
    assert {made.text for made in one} != {
        made.text for made in local.generate("the cat", 300, temperature=1.0, max_tokens=1, seed=4)
    } or len({made.text for made in one}) > 5
    few = local.generate("the cat", 200, temperature=1.0, top_p=0.2, max_tokens=1, seed=3)
    with torch.no_grad():
        p = (
            local.model(torch.tensor([local.tokenizer("the cat")["input_ids"]]))
            .logits[0, -1]
            .softmax(-1)
            .sort(descending=True)
        )
    allowed = int((p.values.cumsum(0) - p.values < 0.2).sum())
    assert {made.text for made in few} <= {local.tokenizer.decode([i]) for i in p.indices[:allowed].tolist()}


def test_a_stop_text_ends_a_continuation_before_it(local):
    (whole,) = local.generate("the cat", max_tokens=8)
    word = whole.text.split()[2]
    (cut,) = local.generate("the cat", max_tokens=8, stop=[word])
    assert cut.text == whole.text[: whole.text.index(word)]
    assert cut.finish == "stop"


def test_a_prompt_longer_than_the_window_is_told(folder):
    local = connect(model=folder, cache=False)
    window = local.model.config.max_position_embeddings
    long = "the cat " * window
    for ask in (local.generate, local.token_logprobs, lambda text: local.score(text, ["cat"])):
        with pytest.raises(InputError, match=f"window of {window}"):
            ask(long)
    near = "the " * (window - 3)
    (made,) = local.generate(near, max_tokens=50)
    assert made.completion_tokens <= 3


def test_a_model_without_a_chat_template_says_so(local):
    with pytest.raises(ModelError, match="no chat template"):
        local.chat(ASK)


def test_answers_are_kept_under_all_that_they_depend_on(folder, tmp_path):
    model = connect(model=folder, cache=tmp_path / "a.sqlite")
    first = model.generate("the cat", temperature=1.0, max_tokens=4, seed=1)
    assert not first[0].cached
    again = connect(model=folder, cache=tmp_path / "a.sqlite")
    kept = again.generate("the cat", temperature=1.0, max_tokens=4, seed=1)
    assert kept[0].cached
    assert kept[0].text == first[0].text
    assert again.usage.calls == 0
    assert again.usage.cached == 1
    for other in ({"seed": 2}, {"max_tokens": 5}, {"temperature": 0.5}):
        assert not again.generate("the cat", **({"temperature": 1.0, "max_tokens": 4, "seed": 1} | other))[0].cached
    assert np.array_equal(model.score("the", ["cat"]), again.score("the", ["cat"]))
    assert again.token_logprobs("the cat") == model.token_logprobs("the cat")
    (tmp_path / "broken.sqlite").write_bytes(b"no database" * 100)
    with pytest.raises(sqlite3.DatabaseError):
        connect(model=folder, cache=tmp_path / "broken.sqlite")


def test_an_endpoint_is_asked_over_http_once_for_each_question(tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with protocol_server() as server:
        model = endpoint(server, tmp_path)
        made = model.chat(ASK, temperature=0.5, seed=7, stop=["x"])
        assert made.text == "three two one"
        assert (made.prompt_tokens, made.completion_tokens) == (7, 3)
        path, body, headers = server.seen[0]
        assert path == "/v1/chat/completions"
        assert body["model"] == "reverser"
        assert (body["temperature"], body["seed"], body["stop"]) == (0.5, 7, ["x"])
        assert {name.lower(): value for name, value in headers.items()}["authorization"] == "Bearer secret-key"
        assert model.chat(ASK, temperature=0.5, seed=7, stop=["x"]).cached
        assert len(server.seen) == 1
        assert model.usage.completion_tokens == 3
        assert "secret-key" not in repr(model) + (tmp_path / "answers.sqlite").read_bytes().decode("latin-1")
        several = model.chat_many([[{"role": "user", "content": f"{i} a"}] for i in range(20)])
        assert [one.text for one in several] == [f"a {i}" for i in range(20)]


def test_a_model_that_is_saved_and_read_asks_as_before_and_its_key_is_not_saved(folder, local, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key")
    with protocol_server() as server:
        model = endpoint(server, tmp_path, concurrency=3)
        assert model.chat(ASK).text == "three two one"
        held = pickle.dumps(model)
        assert b"secret-key" not in held
        monkeypatch.setenv("OPENAI_API_KEY", "other-key")
        again = pickle.loads(held)
        assert again.chat(ASK).cached
        assert again.chat(ASK, seed=1).text == "three two one"
        headers = {name.lower(): value for name, value in server.seen[-1][2].items()}
        assert headers["authorization"] == "Bearer other-key"
    said = local.generate("the cat", max_tokens=3)[0].text
    named = pickle.dumps(local)
    given = LocalModel.of("tiny", local.model, local.tokenizer)
    assert len(named) < 2_000 < len(pickle.dumps(given))
    for one in (pickle.loads(named), pickle.loads(pickle.dumps(given))):
        assert one.generate("the cat", max_tokens=3)[0].text == said


def test_an_endpoint_gives_log_probabilities_and_scores():
    with protocol_server() as server:
        model = endpoint(server)
        made = model.chat(ASK, logprobs=True)
        assert [(token.text, token.start) for token in made.tokens] == [("three", 0), (" two", 5), (" one", 9)]
        assert model.score("one two", [" three", " three four"]).tolist() == [-6.0, -11.0]
        tokens = model.token_logprobs("one two three")
        assert [token.logprob for token in tokens] == [None, -4.0, -6.0]
        with pytest.raises(ScoringUnavailable, match="begin it with a space"):
            model.score("one two", ["three"])


@pytest.mark.parametrize("failure", [500, 429, "half", "slow"])
def test_what_may_pass_is_tried_again_and_counted(failure):
    with protocol_server(failure, failure) as server:
        model = endpoint(server, timeout=0.4)
        assert model.chat(ASK).text == "three two one"
        assert model.usage.retries == 2
        assert len(server.seen) == 3


@pytest.mark.parametrize("failure", [500, 429, "half", "slow"])
def test_what_does_not_pass_ends_within_the_bound(failure):
    with protocol_server(*[failure] * 9, delay=0.6) as server:
        with pytest.raises(EndpointUnavailable, match=r"127\.0\.0\.1"):
            endpoint(server, timeout=0.2, retries=1).chat(ASK)
        assert len(server.seen) == 2


@pytest.mark.parametrize("failure", ["wrong JSON", "other JSON"])
def test_an_answer_that_is_none_is_asked_for_again_within_a_bound(failure):
    with protocol_server(failure) as server:
        model = endpoint(server)
        assert model.chat(ASK).text == "three two one"
        assert model.usage.malformed == 1
    with protocol_server(*[failure] * 9) as server:
        with pytest.raises(EndpointUnavailable, match="something other than the protocol"):
            endpoint(server).chat(ASK)
        assert len(server.seen) == 3


@pytest.mark.parametrize("status", [400, 401, 404])
def test_a_refusal_is_told_at_once_and_without_the_key(monkeypatch, status):
    monkeypatch.setenv("MY_KEY", "secret-key")
    with protocol_server(*[status] * 9) as server:
        with pytest.raises(EndpointError, match=str(status)) as told:
            endpoint(server, api_key_env="MY_KEY").chat(ASK)
        assert not isinstance(told.value, EndpointUnavailable)
        assert "secret-key" not in str(told.value)
        assert len(server.seen) == 1


def test_log_probabilities_that_are_accepted_and_not_given_are_named():
    with protocol_server("no logprobs", "no logprobs", 404) as server:
        model = endpoint(server)
        with pytest.raises(LogprobsUnavailable, match=r"127\.0\.0\.1.*gave none"):
            model.chat(ASK, logprobs=True)
        with pytest.raises(LogprobsUnavailable, match="gave none") as told:
            model.score("one", [" two"])
        assert "404" in str(told.value)  # nor has it a chat
    with protocol_server(404) as server, pytest.raises(ScoringUnavailable, match=r"echo.*first token.*gave none"):
        endpoint(server).score("one", [" two"])
    with protocol_server(401) as server, pytest.raises(EndpointError, match="401") as told:
        endpoint(server).score("one", [" two"])
    assert not isinstance(told.value, ScoringUnavailable)


def no_completions(path, body):
    return None if path.endswith("/chat/completions") else (404, {"message": "no such route"})


def test_without_echo_words_of_one_token_are_scored_by_the_first_token_of_an_answer():
    first = [("yes", math.log(0.5)), (" yes", math.log(0.2)), ("no", math.log(0.1)), ("It", math.log(0.05))]
    with protocol_server(refuse=no_completions, first=first) as server:
        model = endpoint(server)
        found = model.score("Is it?", [" yes", " no", " perhaps"])
        assert found == pytest.approx(np.log([0.7, 0.1, 0.05]))  # what is not told is at most the least that is
        assert [path.rsplit("/", 2)[1] for path, *_ in server.seen] == ["v1", "chat"]
        table = model.score_table([f"Is it {i}?" for i in range(5)], [" yes", " no"])
        assert table.shape == (5, 2)
        assert len(server.seen) == 7  # what it does not have is asked for once
        assert model.usage.prompt_tokens == 6 * 7
        with pytest.raises(ScoringUnavailable, match="more than one token"):
            model.score("Is it?", [" Italy", " yes"])
        with pytest.raises(ScoringUnavailable, match="none of the continuations"):
            model.score("Is it?", [" maybe", " never"])


def test_a_server_that_tells_five_tokens_is_asked_for_five():
    def refuse(path, body):
        if body.get("top_logprobs", 0) > 5:
            return 400, {"message": "top_logprobs must be at most 5", "param": "top_logprobs"}
        return no_completions(path, body)

    with protocol_server(refuse=refuse, first=[("yes", -0.1), ("no", -3.0)]) as server:
        assert endpoint(server).score_table(["a", "b"], [" yes", " no"])[1] == pytest.approx([-0.1, -3.0])


@pytest.mark.parametrize(
    ("parameter", "status", "error"),
    [
        ("seed", 422, {"message": "{'detail': [{'type': 'extra_forbidden', 'loc': ['body', 'seed']}]}"}),
        ("temperature", 400, {"message": "Only the default (1) value is supported.", "param": "temperature"}),
        ("top_p", 400, {"message": "Unsupported parameter: top_p", "param": None}),
    ],
)
def test_a_parameter_that_a_server_does_not_take_is_left_out_and_told_once(parameter, status, error):
    with protocol_server(refuse=lambda path, body: (status, error) if parameter in body else None) as server:
        model = endpoint(server)
        with pytest.warns(UserWarning, match=f"does not take {parameter}") as told:
            made = model.generate("one two", 3, temperature=0.5, top_p=0.9, seed=1)
        assert [one.text for one in made] == ["two one"] * 3
        assert len(told) == 1
        before = len(server.seen)
        assert model.chat(ASK).text == "three two one"
        assert len(server.seen) == before + 1
        assert parameter not in server.seen[-1][1]


def test_new_names_and_stop_texts_are_a_matter_of_the_client():
    def refuse(path, body):
        if "max_tokens" in body:
            text = "Unsupported parameter: 'max_tokens' is not supported with this model. Use 'max_completion_tokens' instead."
            return 400, {"message": text, "param": "max_tokens", "code": "unsupported_parameter"}
        return (400, {"message": "no", "param": "stop"}) if "stop" in body else None

    with protocol_server(refuse=refuse) as server:
        made = endpoint(server).chat(ASK, stop=["one"], max_tokens=9, logprobs=True)
    assert (made.text, made.finish) == ("three two ", "stop")
    assert all(token.start < len(made.text) for token in made.tokens)
    assert server.seen[-1][1]["max_completion_tokens"] == 9


def test_a_refusal_that_repeats_the_request_is_told_as_it_is():
    with protocol_server(
        refuse=lambda path, body: (400, {"message": f"too long: { ({'seed': 1, 'temperature': 0}) }"})
    ) as server:
        with pytest.raises(EndpointError, match="too long"):
            endpoint(server).chat(ASK)
        assert len(server.seen) == 1


def test_top_p_is_sent_and_continuations_are_asked_for_together():
    with protocol_server(*["slow"] * 6, delay=0.3) as server:
        model = endpoint(server, concurrency=6)
        began = time.perf_counter()
        model.generate("one two", 6, top_p=0.9, temperature=1.0)
        assert time.perf_counter() - began < 6 * 0.3
    assert {body["top_p"] for _, body, _ in server.seen} == {0.9}
    assert {body["seed"] for _, body, _ in server.seen} == set(range(6))


def test_no_more_requests_at_a_time_than_was_said():
    now, most, lock = 0, 0, threading.Lock()

    def answer(messages):
        nonlocal now, most
        with lock:
            now += 1
            most = max(most, now)
        time.sleep(0.03)
        with lock:
            now -= 1
        return "yes"

    with protocol_server(answer=answer) as server:
        endpoint(server, concurrency=3).generate_many([f"{i}" for i in range(4)], 4, temperature=1.0)
    assert 2 <= most <= 3


def test_a_key_that_cannot_be_sent_is_refused_without_being_told(monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "secret\nkey")
    with pytest.raises(InputError, match="OPENAI_API_KEY") as told:
        connect("http://localhost:1/v1", "m", cache=False)
    assert "secret" not in str(told.value)
    monkeypatch.setenv("OPENAI_API_KEY", "secret-key\n")  # of a file that was read whole
    with protocol_server() as server:
        assert endpoint(server).chat(ASK).text == "three two one"
    assert {name.lower(): value for name, value in server.seen[0][2].items()}["authorization"] == "Bearer secret-key"


def test_an_error_with_status_200_is_told():
    with protocol_server(refuse=lambda path, body: (200, {"message": "the upstream is out"})) as server:
        with pytest.raises(EndpointUnavailable, match="the upstream is out"):
            endpoint(server).chat(ASK)
        assert len(server.seen) == 3


def test_an_address_without_v1_is_told():
    with protocol_server(404) as server, pytest.raises(EndpointError, match="end with /v1"):
        connect(server.url.removesuffix("/v1"), "m", cache=False).chat(ASK)


@pytest.mark.parametrize(
    ("pieces", "places", "text", "starts"),
    [
        (["<s>", "one", " two", "!"], [0, 3, 6, 10], "one two!", [0, 3]),  # a token that begins every text is told
        (["caf", "bytes:\\xc3", "bytes:\\xa9", " no", "!"], [0, 3, 3, 4, 7], "café no!", [0, 3, 3, 4]),
    ],
)
def test_tokens_that_are_not_text_are_placed_in_it(pieces, places, text, starts):
    told = {"tokens": pieces, "token_logprobs": [None, *([-1.0] * (len(pieces) - 1))], "text_offset": places}
    tokens, _ = _read_echo({"choices": [{"text": text, "logprobs": told}]}, text[:-1])
    assert [token.start for token in tokens] == starts
    assert "".join(token.text for token in tokens) == text[:-1]


def test_parts_of_an_answer_are_put_together():
    content = [{"type": "thinking", "thinking": []}, {"type": "text", "text": "4"}, {"type": "text", "text": "2"}]
    made = _read_chat({"choices": [{"message": {"content": content}}], "usage": {"prompt_tokens": None}})
    assert (made.text, made.prompt_tokens) == ("42", 0)


def test_weights_that_were_saved_anew_are_another_model(folder, tmp_path):
    copied = shutil.copytree(folder, tmp_path / "copied")
    first = connect(model=str(copied), cache=tmp_path / "a.sqlite")
    first.score("the", ["cat"])
    again = connect(model=str(copied), cache=tmp_path / "a.sqlite")
    again.score("the", ["cat"])
    assert (again.usage.calls, again.usage.cached) == (0, 1)
    weights = next(copied.glob("*.safetensors"))
    os.utime(weights, ns=(1, 1))
    other = connect(model=str(copied), cache=tmp_path / "a.sqlite")
    other.score("the", ["cat"])
    assert (other.usage.calls, other.usage.cached) == (1, 0)


def test_tokens_of_scores_are_counted_and_kept(folder, tmp_path):
    model = connect(model=folder, cache=tmp_path / "a.sqlite")
    first = model.score_many(["the cat", "the dog sat"], ["sat", "on the mat"])
    assert [one.tokens for one in first] == [2 + 4, 3 + 4]
    assert model.usage.prompt_tokens == 13
    again = model.score_many(["the cat", "the dog sat"], ["sat", "on the mat"])
    assert [one.tokens for one in again] == [6, 7]
    assert all(one.cached for one in again)
    assert model.usage.prompt_tokens == 13
    model.token_logprobs("the cat sat")
    assert model.usage.prompt_tokens == 16


def test_what_was_scored_before_a_failure_is_kept(tmp_path):
    with protocol_server("ok", "ok", 401, 401, 401) as server:
        model = endpoint(server, tmp_path, concurrency=1)
        with pytest.raises(EndpointError, match="401"):
            model.score_table(["a b", "c d", "e f", "g h"], [" x"])
        model.score_table(["a b", "c d"], [" x"])
        assert model.usage.cached == 2


def test_a_server_that_is_not_there_is_told():
    with protocol_server() as server:
        url = server.url
    with pytest.raises(EndpointUnavailable, match="did not answer"):
        connect(url, "m", cache=False, retries=0).chat(ASK)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda m: connect("localhost:8000", "m", cache=False), "http://localhost"),
        (lambda m: connect("http://localhost/v1", cache=False), "name the endpoint's model"),
        (lambda m: connect("http://localhost/v1", "m", cache=False, timeout=0.0), "timeout"),
        (lambda m: connect("http://localhost/v1", "m", cache=False, concurrency=0), "concurrency"),
        (lambda m: m.chat([]), "at least one message"),
        (lambda m: m.chat([{"role": "user"}]), "a message is"),
        (lambda m: m.chat(ASK, temperature=-1.0), "temperature"),
        (lambda m: m.generate("the", 0), "n >= 1"),
        (lambda m: m.generate("the", stop=[""]), "none of them empty"),
        (lambda m: m.score("the", []), "at least one continuation"),
        (lambda m: m.score("the", ["cat", ""]), "none of them empty"),
        (lambda m: m.score("", ["cat"]), "no tokens"),
        (lambda m: m.token_logprobs(""), "empty text"),
    ],
)
def test_bad_input_is_told_before_anything_is_asked(local, call, text):
    with pytest.raises(InputError, match=text):
        call(local)


def test_a_log_probability_that_is_no_number_is_no_answer():
    choice = {"message": {"content": "a"}, "logprobs": {"content": [{"token": "a", "logprob": math.nan}]}}
    with pytest.raises(ValueError, match="not a number"):
        _read_chat({"choices": [choice]})


def test_a_prompt_that_stands_twice_is_asked_once():
    with protocol_server() as server:
        made = endpoint(server).generate_many(["a b", "c d", "a b"], 2)
    assert [row[0].text for row in made] == ["b a", "d c", "b a"]
    assert len(server.seen) == 4


def test_a_character_that_is_split_over_tokens_belongs_to_the_last_of_them():
    rows = [
        {"token": "caf", "logprob": -0.1, "bytes": list(b"caf")},
        {"token": "\\xc3", "logprob": -0.2, "bytes": [0xC3]},
        {"token": "\\xa9", "logprob": -0.3, "bytes": [0xA9]},
        {"token": "!", "logprob": -0.4, "bytes": None},
    ]
    choice = {"message": {"content": "café!"}, "logprobs": {"content": rows}, "finish_reason": "stop"}
    tokens = _read_chat({"choices": [choice]}).tokens
    assert [(token.text, token.start) for token in tokens] == [("caf", 0), ("", 3), ("é", 3), ("!", 4)]
