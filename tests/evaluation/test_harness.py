"""The model for lm-evaluation-harness: what its requests come to."""

from __future__ import annotations

import json

import pytest
import torch
from lm_eval.api.instance import Instance
from lm_eval.api.registry import get_model

from tests.closeness import close_to
from trl_diffusion import DecodingConfig, decode, tiny_policy_path
from trl_diffusion.evaluation.harness import DiffusionLM
from trl_diffusion.evaluation.likelihood import chain_likelihoods, elbo_likelihoods


CONTEXTS = ["sudoku 3102200002100320", "countdown 30,100,93=23", "sudoku 0140432014020000"]


def request(kind: str, arguments: tuple, doc_id: int) -> Instance:
    return Instance(kind, {}, arguments, 0, metadata=("task", doc_id, 1))


def generations(contexts, **options) -> list[Instance]:
    options = {"until": [], "do_sample": False, **options}
    return [request("generate_until", (context, dict(options)), place) for place, context in enumerate(contexts)]


def ask(policy, contexts, config, seeds=None) -> list[str]:
    """The answers, one by one, straight from the decoder."""
    seeds = seeds or [0] * len(contexts)
    answers = [
        decode(policy.model, [policy.tokenizer(context)["input_ids"]], config, policy.spec, [seed]).completions()[0]
        for context, seed in zip(contexts, seeds, strict=True)
    ]
    return [policy.tokenizer.decode(answer, skip_special_tokens=True) for answer in answers]


def test_it_is_registered():
    assert get_model("trl_diffusion") is DiffusionLM


@pytest.mark.parametrize("batch_size", [1, 2, "auto"])
def test_answers_are_the_decoders(tiny, batch_size):
    lm = DiffusionLM(policy=tiny, decoding="tokens_per_step:2", batch_size=batch_size)
    answers = lm.generate_until(generations(CONTEXTS, max_gen_toks=17), disable_tqdm=True)
    assert answers == ask(tiny, CONTEXTS, DecodingConfig(17, tokens_per_step=2))
    assert len(set(answers)) == 3
    assert lm.usage.answers == 3 and 1 < lm.usage.tokens_per_forward < 2


def test_stop_strings(tiny):
    whole = ask(tiny, CONTEXTS, DecodingConfig(17))
    stop = whole[0][5]
    lm = DiffusionLM(policy=tiny, batch_size=8)
    answers = lm.generate_until(generations(CONTEXTS, max_gen_toks=17, until=[stop, "x"]), disable_tqdm=True)
    assert answers == [text.split(stop)[0] for text in whole]
    assert answers != whole


def test_settings_win_over_the_task(tiny):
    """Number of tokens and temperature are the task's unless `decoding` says."""
    requests = generations(CONTEXTS, max_gen_toks=17, do_sample=True, temperature=0.7)
    follows, wins = (
        DiffusionLM(policy=tiny),
        DiffusionLM(policy=tiny, decoding={"temperature": 0.0, "max_new_tokens": 3}),
    )
    option = dict(requests[0].args[1])
    assert follows._settings(dict(option)) == DecodingConfig(17, 0.7)
    assert wins._settings(dict(option)) == DecodingConfig(3, 0.0)
    assert wins.generate_until(requests, disable_tqdm=True) == ask(tiny, CONTEXTS, DecodingConfig(3))
    # A task without `do_sample` is greedy, as everywhere in the harness.
    assert follows._settings(
        {"max_gen_toks": 4, "do_sample": False, "temperature": 0.0, "top_p": 0.9}
    ) == DecodingConfig(4)


def test_what_the_decoder_cannot_do_is_refused(tiny):
    requests = generations(CONTEXTS, do_sample=True, temperature=1.0, num_beams=4)
    with pytest.raises(ValueError, match=r"num_beams=4.*does not have"):
        DiffusionLM(policy=tiny).generate_until(requests, disable_tqdm=True)


def test_samples_depend_on_question_seed_and_repetition_alone(tiny):
    requests = generations(CONTEXTS, max_gen_toks=17, do_sample=True, temperature=1.0)
    answers = DiffusionLM(policy=tiny, batch_size=3).generate_until(requests, disable_tqdm=True)
    # The order and the number of requests, as they are when processes share them, change nothing.
    backwards = DiffusionLM(policy=tiny, batch_size=2).generate_until(requests[:0:-1], disable_tqdm=True)
    assert backwards == answers[:0:-1]
    assert DiffusionLM(policy=tiny, seed=1).generate_until(requests, disable_tqdm=True) != answers
    first, second = DiffusionLM(policy=tiny).generate_until([requests[0]] * 2, disable_tqdm=True)
    assert first == answers[0] != second


def likelihoods(pairs) -> list[Instance]:
    return [request("loglikelihood", pair, place) for place, pair in enumerate(pairs)]


PAIRS = [(CONTEXTS[0], " 31"), (CONTEXTS[0], " 3142"), ("", "12"), (CONTEXTS[1] + " ", "5")]


def test_loglikelihood_is_the_bound(tiny):
    lm = DiffusionLM(policy=tiny, num_draws=5, seed=3, batch_size=4)
    found = lm.loglikelihood(likelihoods(PAIRS), disable_tqdm=True)
    encode = lambda text: tiny.tokenizer(text)["input_ids"]  # noqa: E731
    prompts = [encode(CONTEXTS[0]), encode(CONTEXTS[0]), [tiny.tokenizer.eos_token_id], encode(CONTEXTS[1])]
    continuations = [encode(" 31"), encode(" 3142"), encode("12"), encode(" 5")]  # spaces belong to the continuation
    assert [value for value, _ in found] == close_to(elbo_likelihoods(tiny, prompts, continuations, 5, 3))
    assert lm.get_model_info()["num_draws"] == 5


def test_greedy_is_what_the_policy_would_answer(tiny):
    config = DecodingConfig(6, tokens_per_step=2)
    answers = ask(tiny, CONTEXTS[:2], config)
    answers[1] = ("2" if answers[1][0] != "2" else "3") + answers[1][1:]
    pairs = likelihoods(zip(CONTEXTS[:2], answers, strict=True))
    for likelihood, check, expected in (("elbo", True, [True, False]), ("elbo", False, [False, False])):
        lm = DiffusionLM(
            policy=tiny, decoding="tokens_per_step:2", likelihood=likelihood, check_greedy=check, num_draws=1
        )
        assert [greedy for _, greedy in lm.loglikelihood(pairs, disable_tqdm=True)] == expected


@pytest.mark.parametrize("family", ["tiny", "llada"])
def test_left_to_right(request, family):
    policy = request.getfixturevalue(family)
    lm = DiffusionLM(policy=policy, likelihood="left_to_right")
    found = lm.loglikelihood(likelihoods(PAIRS[:2]), disable_tqdm=True)
    encode = lambda text: policy.tokenizer(text)["input_ids"]  # noqa: E731
    chain = chain_likelihoods(policy, [encode(CONTEXTS[0])] * 2, [encode(" 31"), encode(" 3142")])
    assert [value for value, _ in found] == close_to([one.value for one in chain])


def test_rolling_covers_every_token_once(tiny):
    """In windows of whole blocks: with the context of one window, it is the likelihood after the prefix; beyond, a sum."""
    text = "3142" * 5
    lm = DiffusionLM(policy=tiny, likelihood="left_to_right", max_length=48)
    (value,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    ids, prefix = tiny.tokenizer(text)["input_ids"], [tiny.tokenizer.eos_token_id]
    assert value == close_to(chain_likelihoods(tiny, [prefix], [ids])[0].value)
    short = DiffusionLM(policy=tiny, likelihood="left_to_right", max_length=17)  # windows of 8
    (value,) = short.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert short.max_length == 17
    pieces = [(prefix, ids[:8]), (ids[7:8], ids[8:16]), (ids[11:16], ids[16:20])]
    expected = sum(chain_likelihoods(tiny, [context], [piece])[0].value for context, piece in pieces)
    assert value == close_to(expected)


def test_arguments_from_a_command_line(adapter):
    """As the harness passes `--model_args`: strings, numbers and truth values."""
    lm = DiffusionLM.create_from_arg_obj(
        {"pretrained": tiny_policy_path(), "peft": adapter, "decoding": "tokens_per_step:2", "num_draws": 3},
        {"batch_size": "4", "max_batch_size": None, "device": "cuda:0"},
    )
    assert lm.decoding == {"tokens_per_step": 2} and lm.batch_size == 4
    assert lm.policy.device.type == ("cuda" if torch.cuda.is_available() else "cpu")
    assert any("lora_" in name for name, _ in lm.policy.model.named_parameters())
    assert json.dumps(lm.get_model_info())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"likelihood": "exact"}, "`likelihood` must be one of"),
        ({"num_draws": 0}, "`num_draws` must be a whole number of at least 1"),
        ({"decoding": "speed:1"}, "Unknown decoding settings"),
        ({"batch_size": 0}, "`batch_size` must be a whole number of at least 1"),
    ],
)
def test_bad_arguments(tiny, options, message):
    with pytest.raises(ValueError, match=message):
        DiffusionLM(policy=tiny, **options)
