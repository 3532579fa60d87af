"""A real HTTP server in the test process that speaks the OpenAI protocol, its failures included."""

import json
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body are written apart; together they would wait for each other

    def log_message(self, *_):
        pass

    def do_POST(self):
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.seen.append((self.path, body, dict(self.headers)))
        how = self.server.plan.pop(0) if self.server.plan else "ok"
        refusal = self.server.refuse(self.path, body)
        if refusal is not None:
            self._send(json.dumps({"error": refusal[1]}), refusal[0])
        elif isinstance(how, int):
            error = {"error": {"message": f"refused, key {self.headers.get('Authorization', '')}"}}
            self._send(json.dumps(error), how, {"Retry-After": "0"})
        elif how == "slow":
            time.sleep(self.server.delay)
            self._send(self._answer(body), 200)
        elif how == "half":
            text = self._answer(body)
            self.send_response(200)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text.encode())))
            self.end_headers()
            self.wfile.write(text.encode()[: len(text) // 2])
            self.close_connection = True
        elif how == "wrong JSON":
            self._send('{"choices": [}', 200)
        elif how == "other JSON":
            self._send('{"answer": 42}', 200)
        else:
            self._send(self._answer(body, logprobs=how != "no logprobs"), 200)

    def _answer(self, body, logprobs=True):
        """Chat: ``answer``, or the last message's words in reverse. Completions with echo: log p of a word is -its length."""
        if self.path.endswith("/chat/completions"):
            said = self.server.answer(body["messages"])
            choice = {"index": 0, "finish_reason": "stop", "message": {"role": "assistant", "content": said}}
            if body.get("logprobs"):
                pieces = re.findall(r"\s?\S+", choice["message"]["content"])
                top = [{"token": token, "logprob": logprob} for token, logprob in self.server.first]
                rows = [
                    {"token": piece, "logprob": -0.5, "top_logprobs": top[: body.get("top_logprobs", 0)]}
                    for piece in pieces
                ]
                choice["logprobs"] = {"content": rows if logprobs else []}
        else:
            pieces = re.findall(r"\s?\S+", body["prompt"])
            starts = [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]
            numbers = [None, *(-float(len(piece)) for piece in pieces[1:]), -9.0]
            told = {"tokens": [*pieces, "!"], "token_logprobs": numbers, "text_offset": starts}
            choice = {"index": 0, "text": body["prompt"] + "!", "logprobs": told if logprobs else None}
        return json.dumps({"choices": [choice], "usage": {"prompt_tokens": 7, "completion_tokens": 3}})

    def _send(self, text, status, headers=None):
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(text.encode()))}.items():
            self.send_header(name, value)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.end_headers()
        try:
            self.wfile.write(text.encode())
        except OSError:  # the client waited no longer
            self.close_connection = True


def _reversed_words(messages):
    return " ".join(messages[-1]["content"].split()[::-1])


@contextmanager
def protocol_server(*plan, delay=1.0, answer=_reversed_words, port=0, refuse=lambda path, body: None, first=()):
    """The server; ``plan`` says how it answers the first requests: "ok", a status, "slow", "half", "wrong JSON",
    "other JSON", "no logprobs"; then all is well. ``seen`` holds what was asked, ``url`` is its address.
    answer(messages) is what it says to a chat. port: a free one where 0. refuse(path, body): (status, error) of a request that
    it does not take, None where it does. first: the likeliest first tokens of a chat, with their log-probabilities.
    """
    server = ThreadingHTTPServer(("127.0.0.1", port), _Handler)
    server.plan, server.seen, server.delay, server.answer = list(plan), [], delay, answer
    server.refuse, server.first = refuse, list(first)
    server.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
