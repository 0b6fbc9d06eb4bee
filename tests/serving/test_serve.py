"""What a server answers is what the policy answers in this process, whoever else asks."""

from __future__ import annotations

import json
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import torch

from tests.closeness import assert_close
from tests.serving.conftest import LIMIT, SETTINGS, serving
from trl_diffusion import DecodingConfig, decode
from trl_diffusion.decoding.live import LiveLoop
from trl_diffusion.policies.forward import NonFiniteLogits
from trl_diffusion.policies.loading import load_tokenizer
from trl_diffusion.policies.policy import Policy, open_policy
from trl_diffusion.rewards import sudoku
from trl_diffusion.seeds import derive_seed
from trl_diffusion.serving.engine import Engine


PROMPTS = [sudoku.prompt(row["puzzle"]) for row in sudoku.generate(8, seed=0)]
SAMPLED = {"temperature": 1.0, "max_tokens": 17}


def decoded(policy: Policy, prompts: list[str], seeds: list[int], temperature=1.0, new_tokens=17, **settings):
    config = DecodingConfig(new_tokens, temperature, **{**SETTINGS, **settings})
    return decode(policy.model, policy.encode(prompts), config, policy.spec, seeds)


def test_64_at_once_get_what_each_gets_alone(client, embedded):
    """In lanes for 8. None is lost, and none gets another's answer."""
    prompts = [PROMPTS[number % len(PROMPTS)] for number in range(64)]
    expected = decoded(embedded, prompts, list(range(64)))
    with ThreadPoolExecutor(64) as pool:
        answers = list(
            pool.map(
                lambda one: client.complete(one[1], seed=one[0], return_denoising=True, **SAMPLED), enumerate(prompts)
            )
        )
    assert len({choice["text"] for (choice,) in answers}) > 8
    for row, (choice,) in enumerate(answers):
        length, found = int(expected.canvas_lengths[row]), choice["denoising"]
        assert found["token_ids"] == expected.canvas_ids[row, :length].tolist()
        assert found["steps"] == expected.steps[row, :length].tolist() and found["seed"] == row
        assert found["completion_length"] == int(expected.completion_lengths[row])
        assert_close(torch.tensor(found["log_probs"]), expected.logps[row, :length])
        assert choice["text"] == embedded.decode(expected.completions()[row : row + 1])[0]
        ended = expected.completions()[row][-1] in embedded.spec.stop_token_ids
        assert choice["finish_reason"] == ("stop" if ended else "length")


def test_forms_of_a_prompt_and_seeds_of_choices(client, embedded):
    ids = embedded.encode(PROMPTS[:2])
    found = [client.complete(one, n=2, seed=5, **SAMPLED) for one in (PROMPTS[:2], ids)]
    assert found[0] == found[1] and [choice["index"] for choice in found[0]] == [0, 1, 2, 3]
    seeds = [5, *(derive_seed(5, place) for place in (1, 2, 3))]
    expected = embedded.decode(decoded(embedded, [one for one in PROMPTS[:2] for _ in range(2)], seeds).completions())
    assert [choice["text"] for choice in found[0]] == expected
    for one in (PROMPTS[0], ids[0]):
        assert [choice["text"] for choice in client.complete(one, seed=5, **SAMPLED)] == expected[:1]
    greedy = embedded.decode(decoded(embedded, PROMPTS[:1], [0], temperature=0.0, new_tokens=LIMIT).completions())
    assert [choice["text"] for choice in client.complete(PROMPTS[0])] == greedy  # the defaults of the server


def test_log_probs_and_usage(client, embedded):
    expected = decoded(embedded, PROMPTS[:1], [3])
    status, body = client.send("/v1/completions", {"prompt": PROMPTS[0], "seed": 3, "logprobs": 1, **SAMPLED})
    (choice,), count = body["choices"], int(expected.completion_lengths[0])
    assert status == 200 and body["object"] == "text_completion" and body["model"] == "tiny"
    prompt = len(embedded.encode(PROMPTS[:1])[0])
    assert body["usage"] == {"prompt_tokens": prompt, "completion_tokens": count, "total_tokens": prompt + count}
    found = choice["logprobs"]
    assert_close(torch.tensor(found["token_logprobs"]), torch.tensor(expected.completion_logps()[0]))
    assert "".join(found["tokens"]).startswith(choice["text"]) and found["text_offset"] == list(range(count))


def test_a_stop_text_cuts(client):
    (whole,) = client.complete(PROMPTS[0])
    stop = whole["text"][5:7]
    (cut,) = client.complete(PROMPTS[0], stop=["never", stop], logprobs=1)
    assert cut["text"] == whole["text"].partition(stop)[0] and cut["finish_reason"] == "stop"
    assert "".join(cut["logprobs"]["tokens"]) == cut["text"]
    events = client.stream(PROMPTS[0], stop=stop)
    assert "".join(event["choices"][0]["text"] for event in events) == cut["text"]


def test_streams(client, embedded):
    """Text comes in parts that are never taken back, and the canvas step by step."""
    expected = decoded(embedded, PROMPTS[:1], [3])
    (text,) = embedded.decode(expected.completions())
    fields = {"seed": 3, "return_denoising": True, "stream_options": {"include_usage": True}, **SAMPLED}
    events = client.stream(PROMPTS[0], stream_canvas=True, **fields)
    choices = [event["choices"][0] for event in events[:-1]]
    parts = [choice["text"] for choice in choices if choice["text"]]
    assert "".join(parts) == text and len(parts) == 3  # the prompt ends in the middle of a block
    assert events[-1]["choices"] == [] and events[-1]["usage"]["completion_tokens"] == int(
        expected.completion_lengths[0]
    )
    assert [choice["finish_reason"] for choice in choices[:-1]] == [None] * (len(choices) - 1)
    last = choices[-1]["denoising"]
    canvas, when = {}, {}
    for number, step in enumerate(choice["canvas"] for choice in choices if "canvas" in choice):
        assert step["step"] == number and step["erased"] == [] and step["positions"]
        canvas |= dict(zip(step["positions"], step["token_ids"], strict=True))
        when |= dict.fromkeys(step["positions"], number)
    written = [place for place, step in enumerate(last["steps"]) if step >= 0]
    assert canvas == {place: last["token_ids"][place] for place in written}
    blocks = embedded.spec.block_of(
        torch.tensor(written) + len(embedded.encode(PROMPTS[:1])[0]), len(embedded.encode(PROMPTS[:1])[0])
    )
    order = sorted(range(len(written)), key=lambda index: when[written[index]])
    keys = [(int(blocks[index]), last["steps"][written[index]]) for index in order]
    assert keys == sorted(keys)


def test_a_decoder_that_takes_tokens_back():
    """Nothing of the text is sent before its end; the canvas of the steps ends as the response."""
    settings = {"temperature": 1.0, "revision": "random", "revision_rate": 0.5}
    policy = open_policy("embedded:revising", device="cpu")
    prompt = PROMPTS[0]
    config = DecodingConfig(17, **settings)
    (row,) = policy.encode(prompt)
    expected = decode(policy.model, [row], config, policy.spec, [4])
    with serving(policy, settings=settings) as (client, _):
        events = client.stream(prompt, seed=4, max_tokens=17, stream_canvas=True, return_denoising=True)
    choices = [event["choices"][0] for event in events]
    canvas, erased = {}, 0
    for step in (choice["canvas"] for choice in choices if "canvas" in choice):
        for place in step["erased"]:
            del canvas[place]
            erased += 1
        canvas |= dict(zip(step["positions"], step["token_ids"], strict=True))
    assert canvas == dict(enumerate(expected.canvas_ids[0].tolist())) and erased > 0
    revisions = choices[-1]["denoising"]["revisions"]
    assert revisions["tokens"] == expected.revisions.tokens[0].tolist()
    assert revisions["until"] == expected.revisions.until[0].tolist()
    assert [choice["text"] for choice in choices if choice["text"]] == policy.decode(expected.completions())


CHAT = "{% for message in messages %}{{ message['content'] }}{% endfor %}"


def test_chat(client, embedded):
    status, body = client.send("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}]})
    assert status == 400 and body["error"]["code"] == "no_chat_template"
    tokenizer = open_tokenizer(embedded)
    tokenizer.chat_template = CHAT
    with serving(replace(embedded, tokenizer=tokenizer)) as (chat, _):
        fields = {"messages": [{"role": "user", "content": PROMPTS[0]}], "max_completion_tokens": 17, "logprobs": True}
        status, body = chat.send("/v1/chat/completions", fields)
        (choice,) = body["choices"]
        (expected,) = chat.complete(PROMPTS[0], max_tokens=17)
        assert choice["message"]["content"] == expected["text"] and body["object"] == "chat.completion"
        assert "".join(one["token"] for one in choice["logprobs"]["content"]).startswith(expected["text"])
        status, body = chat.send("/v1/chat/completions", {"messages": [{"role": "user"}]})
        assert status == 400 and "`content`" in body["error"]["message"]


def open_tokenizer(policy: Policy):
    return load_tokenizer(policy.tokenizer.name_or_path)


def test_a_key_is_asked_for(embedded):
    with serving(embedded, api_key="secret") as (client, _):
        assert client.send("/health")[0] == 200
        for headers in ({}, {"Authorization": "Bearer other"}, {"Authorization": "Bearer é"}):
            status, body = client.send("/v1/models", headers=headers)
            assert status == 401 and body["error"]["code"] == "invalid_api_key"
        status, body = client.send("/v1/models", headers={"Authorization": "Bearer secret"})
        assert status == 200 and json.dumps(body["data"][0]["denoising"]["decoding"])


def test_logits_that_are_not_finite_end_one_response(embedded, monkeypatch):
    """The other one begins again, and gets what it would have got, in a stream without repetitions."""
    seen, step, admit = [], LiveLoop.step, Engine._admit

    def failing(self):
        if self.active == 2 and not seen and all(lane.block == 1 for lane in self.active_lanes()):
            seen.append(
                next(row for row, prompt in enumerate(self.prompts) if prompt == embedded.encode(PROMPTS[1])[0])
            )
            raise NonFiniteLogits(seen[0], "the policy's logits hold NaN.")
        return step(self)

    begun = []

    def admit_both(self):
        begun.extend(self._waiting if len(self._waiting) == 2 else ())
        admit(self) if begun else time.sleep(0.01)

    monkeypatch.setattr(LiveLoop, "step", failing)
    monkeypatch.setattr(Engine, "_admit", admit_both)
    with serving(embedded) as (client, _), ThreadPoolExecutor(2) as pool:
        stream = pool.submit(client.stream, PROMPTS[0], seed=3, stream_canvas=True, **SAMPLED)
        status, body = client.send("/v1/completions", {"prompt": PROMPTS[1], **SAMPLED})
        assert seen and status == 500 and body["error"]["code"] == "non_finite_logits"
        choices = [event["choices"][0] for event in stream.result()]
        (expected,) = client.complete(PROMPTS[0], seed=3, **SAMPLED)
    assert "".join(choice["text"] for choice in choices) == expected["text"]
    steps = [choice["canvas"]["step"] for choice in choices if "canvas" in choice]
    assert steps == list(range(len(steps)))


def test_settings_are_denoised_at_the_same_time(embedded):
    """Six temperatures, of which four fit at once, and each response is that of its own."""
    temperatures = [0.0, 0.2, 0.4, 0.6, 0.8, 1.0]
    with serving(embedded, max_batch=5) as (client, _), ThreadPoolExecutor(6) as pool:
        fields = {"seed": 3, "max_tokens": 17}
        found = list(pool.map(lambda one: client.complete(PROMPTS[0], temperature=one, **fields), temperatures))
    for temperature, (choice,) in zip(temperatures, found, strict=True):
        assert choice["text"] == embedded.decode(decoded(embedded, PROMPTS[:1], [3], temperature).completions())[0]
