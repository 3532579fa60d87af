"""Language models, wherever they run: `connect` gives an endpoint that speaks the OpenAI protocol or a local model.

>>> model = connect()  # SmolLM2-135M on this machine; connect("http://localhost:8000/v1", "name") for an endpoint
>>> model.name
'smollm2'
"""

__all__ = ["ENDPOINT", "MODEL", "LanguageModel", "connect", "named_model"]

import os
from pathlib import Path

from theodolite.core.errors import InputError
from theodolite.language.model import AnswerCache, LanguageModel, default_cache

ENDPOINT, MODEL = "THEODOLITE_ENDPOINT", "THEODOLITE_LANGUAGE_MODEL"
"""Environment variables that name the language model of surveys and reproductions: its endpoint's address, and its name."""


def named_model() -> tuple[str, str] | None:
    """(address, name) of the endpoint that the environment names, as `connect` takes them; None where it names none."""
    url, name = os.environ.get(ENDPOINT), os.environ.get(MODEL)
    return (url, name) if url and name else None


def connect(
    endpoint: str | None = None,
    model: str | None = None,
    *,
    api_key_env: str | None = None,
    cache: str | Path | bool | None = None,
    concurrency: int = 8,
    timeout: float = 60.0,
    retries: int = 3,
) -> LanguageModel:
    """A language model. endpoint: the address of an OpenAI-compatible endpoint; a local model where None.

    model: the endpoint's name of it; without an endpoint "smollm2" (the default), a Hugging Face folder or name.
    api_key_env: the environment variable that holds the key (OPENAI_API_KEY). cache: a file for the answers; the user's
    cache folder where None or True, none where False. concurrency, timeout (seconds), retries: of an endpoint's requests.

    Raises InputError for an endpoint without a model; MissingExtraError without openai or transformers.
    """
    kept = None if cache is False else AnswerCache(default_cache() if cache in (None, True) else Path(str(cache)))
    if endpoint is None:
        from theodolite.language.local import LocalModel

        return LocalModel(model or "smollm2", cache=kept)
    if model is None:
        raise InputError("name the endpoint's model too: connect(endpoint, model)")
    from theodolite.language.endpoint import Endpoint

    return Endpoint(
        endpoint, model, api_key_env=api_key_env or "OPENAI_API_KEY", cache=kept, concurrency=concurrency,
        timeout=timeout, retries=retries,
    )  # fmt: skip
