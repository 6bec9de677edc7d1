"""Replies from an OpenAI-compatible server (vLLM, SGLang); knows HTTP and token ids, no files.

Prompts go as token ids to `/v1/completions`, so that the stored prompt is exactly what the server saw. Replies come as
token ids where the server can (`return_token_ids`), else their text is tokenized again.
"""

import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from itertools import islice
from typing import Any

import httpx
import numpy as np

from dflash_core.errors import TrainingError
from dflash_core.training.engine import Job, Reply

RETRIES = 6
LONGEST_WAIT_SECONDS = 30.0
REFUSALS = 10
_RETRY_STATUS = (408, 409, 425, 429, 500, 502, 503, 504)


@dataclass
class Server:
    """One server and model. `answered` and `refused` count requests over its life.

    url                 with or without the trailing /v1
    tokenizer           the target's, for servers that return text only
    concurrency         requests in flight
    sleep               replaced in tests
    """

    url: str
    model: str | None
    tokenizer: Any
    stop_token_ids: Sequence[int]
    concurrency: int = 64
    api_key: str | None = None
    timeout_seconds: float = 300.0
    sleep: Callable[[float], None] = time.sleep
    answered: int = field(default=0, init=False)
    refused: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        self.url = self.url.rstrip("/").removesuffix("/v1") + "/v1"
        if not self.url.startswith(("http://", "https://")):
            raise TrainingError(
                "The server's address cannot be used.", f"It is '{self.url}'.", "Begin it with http:// or https://."
            )
        self._ask_for_ids = True
        self._client = httpx.Client(
            headers={"Authorization": f"Bearer {self.api_key}"} if self.api_key else {},
            timeout=httpx.Timeout(self.timeout_seconds, connect=10.0),
            limits=httpx.Limits(max_connections=self.concurrency, max_keepalive_connections=self.concurrency),
        )

    def check(self) -> str:
        """The model's name on the server. Raises `TrainingError` if it cannot be reached or does not serve it."""
        answer = self._send("GET", "/models").json()
        names = [str(entry.get("id")) for entry in answer.get("data", ()) if isinstance(entry, dict)]
        if self.model is None and len(names) == 1:
            self.model = names[0]
        if self.model is None or (names and self.model not in names):
            raise TrainingError(
                "The server does not serve this model.",
                f"Asked for: {self.model or 'none'}; served: {', '.join(names) or 'none'}.",
                "Choose one with --model.",
            )
        return self.model

    def generate(self, jobs: Iterable[Job]) -> Iterator[Reply]:
        """Answer every job, in the order replies come; prompts the server refuses are left out and counted."""
        waiting, pool = iter(jobs), ThreadPoolExecutor(self.concurrency)
        flying: set[Future[Reply | None]] = set()
        try:
            while True:
                flying |= {pool.submit(self._answer, job) for job in islice(waiting, self.concurrency - len(flying))}
                if not flying:
                    return
                done, flying = wait(flying, return_when=FIRST_COMPLETED)
                yield from filter(None, (future.result() for future in done))
        finally:
            pool.shutdown(wait=False, cancel_futures=True)

    def close(self) -> None:
        self._client.close()

    def _answer(self, job: Job) -> Reply | None:
        body = {
            "model": self.model, "prompt": list(job.prompt), "max_tokens": job.max_new_tokens,
            "temperature": job.temperature, "top_p": 1.0, "stream": False, "seed": job.key % 2**31,
        }  # fmt: skip
        response = self._send("POST", "/completions", body | ({"return_token_ids": True} if self._ask_for_ids else {}))
        if self._ask_for_ids and response.status_code in (400, 422) and "return_token_ids" in response.text:
            self._ask_for_ids = False
            response = self._send("POST", "/completions", body)
        if response.is_success:
            reply = self._reply(job, response)
            self.answered += 1
            return reply
        self.refused += 1
        if self.refused >= REFUSALS and self.refused > self.answered:
            raise TrainingError(
                "The server refuses the prompts.",
                f"HTTP {response.status_code}: {response.text[:300]}.",
                "Check its log and limits.",
            )
        return None

    def _reply(self, job: Job, response: httpx.Response) -> Reply:
        try:
            choice = response.json()["choices"][0]
            ids, stopped = choice.get("token_ids"), choice.get("finish_reason") == "stop"
            if ids is None:
                ids = self.tokenizer(choice["text"], add_special_tokens=False)["input_ids"]
            tokens = [int(token) for token in ids]
        except (ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
            raise TrainingError(
                "The server's answer cannot be read.",
                f"{response.text[:200]!r}.",
                "Use a server with an OpenAI-compatible /v1/completions.",
            ) from error
        if stopped and self.stop_token_ids and (not tokens or tokens[-1] not in self.stop_token_ids):
            tokens.append(self.stop_token_ids[0])
        return Reply(job, np.array(tokens, np.int32), stopped)

    def _send(self, method: str, path: str, body: Any = None) -> httpx.Response:
        """One request, repeated with growing waits while the server is away or busy, then a `TrainingError`."""
        trouble = ""
        for attempt in range(RETRIES + 1):
            if attempt:
                self.sleep(min(LONGEST_WAIT_SECONDS, 2.0 ** (attempt - 1)) * random.uniform(0.75, 1.25))
            try:
                response = self._client.request(method, self.url + path, json=body)
            except httpx.TransportError as error:
                trouble = str(error) or type(error).__name__
                continue
            if response.status_code not in _RETRY_STATUS:
                self._refuse_strangers(response)
                return response
            trouble = f"HTTP {response.status_code}: {response.text[:200]}"
        raise TrainingError(
            "The server does not answer.",
            f"{self.url}: {trouble.rstrip('.')}.",
            "Start it and run the same command again to go on.",
        )

    def _refuse_strangers(self, response: httpx.Response) -> None:
        if response.status_code in (401, 403):
            raise TrainingError(
                "The server wants a key.", f"HTTP {response.status_code}.", "Give one with --api-key-file."
            )
        if response.status_code == 404:
            raise TrainingError(
                "The server does not know what is asked.", f"{response.url}: HTTP 404.", "Check --server and --model."
            )
