"""Clients of others, where they are installed."""

from __future__ import annotations

from dataclasses import replace

import pytest

from tests.serving.conftest import serving
from tests.serving.test_serve import CHAT, PROMPTS, open_tokenizer
from trl_diffusion.policies.tiny import tiny_policy_path


@pytest.fixture(scope="module")
def chat(embedded):
    """A server of the embedded policy with a chat template that adds nothing."""
    tokenizer = open_tokenizer(embedded)
    tokenizer.chat_template = CHAT
    with serving(replace(embedded, tokenizer=tokenizer)) as (found, _):
        yield found


def test_openai(chat):
    openai = pytest.importorskip("openai", reason="needs the package `openai`")
    (expected,) = chat.complete(PROMPTS[0], max_tokens=17)
    messages = [{"role": "user", "content": PROMPTS[0]}]
    with openai.OpenAI(base_url=chat.url, api_key="none", max_retries=0) as client:
        assert [model.id for model in client.models.list()] == ["tiny"]
        fields = {"model": "tiny", "max_tokens": 17}
        answer = client.completions.create(
            prompt=PROMPTS[0], logprobs=1, extra_body={"return_denoising": True}, **fields
        )
        (choice,) = answer.choices
        assert choice.text == expected["text"] and choice.finish_reason == "stop"
        assert len(choice.denoising["steps"]) == len(choice.logprobs.tokens) == answer.usage.completion_tokens
        parts = [one.choices[0].text for one in client.completions.create(prompt=PROMPTS[0], stream=True, **fields)]
        assert "".join(parts) == expected["text"] and len([part for part in parts if part]) > 1
        talk = client.chat.completions.create(messages=messages, logprobs=True, **fields)
        assert talk.choices[0].message.content == expected["text"] and talk.choices[0].logprobs.content[0].logprob <= 0
        with client.chat.completions.stream(messages=messages, **fields) as stream:
            list(stream)
            assert stream.get_final_completion().choices[0].message.content == expected["text"]
        with pytest.raises(openai.NotFoundError, match="There is no model 'other' here"):
            client.completions.create(model="other", prompt="x")
        with pytest.raises(openai.BadRequestError, match="does not write from left to right"):
            client.completions.create(model="tiny", prompt="x", echo=True)


@pytest.mark.parametrize("ids", [False, True], ids=["text", "token ids"])
def test_lm_evaluation_harness(client, ids):
    """Text is generated; likelihoods are refused, with the reason."""
    for name in ("lm_eval", "tenacity", "aiohttp"):
        pytest.importorskip(name, reason="needs lm_eval with its extra `api`")
    from lm_eval.api.instance import Instance
    from lm_eval.models.openai_completions import LocalCompletionsAPI

    model = LocalCompletionsAPI(
        base_url=f"{client.url}/completions", model="tiny", tokenizer=tiny_policy_path(), tokenizer_backend="huggingface",
        tokenized_requests=ids, max_retries=1, num_concurrent=2, max_length=512,
    )  # fmt: skip
    (whole,) = client.complete(PROMPTS[0], max_tokens=17)
    stop = whole["text"][6:8]
    kwargs = {"until": [stop], "max_gen_toks": 17, "do_sample": False}
    requests = [
        Instance("generate_until", {}, (prompt, dict(kwargs)), number) for number, prompt in enumerate(PROMPTS[:3])
    ]
    found = model.generate_until(requests, disable_tqdm=True)
    expected = [client.complete(prompt, max_tokens=17, stop=[stop])[0]["text"] for prompt in PROMPTS[:3]]
    assert found == expected and found[0] == whole["text"].partition(stop)[0]
    with pytest.raises(Exception, match="does not write from left to right|RetryError|Bad Request"):
        model.loglikelihood([Instance("loglikelihood", {}, (PROMPTS[0], "1"), 0)], disable_tqdm=True)
