"""Orders for stored responses whose order is unknown: chosen without a model, or replayed by one."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch
import xxhash
from datasets import Dataset, is_caching_enabled
from datasets import config as datasets_config
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm.auto import tqdm

from ..policies.forward import NonFiniteLogits
from ..policies.spec import DiffusionSpec
from ..seeds import derive_seed
from ..trajectories.dataset import EVENTS, Provenance, completions_of, is_unordered, to_rows
from ..trajectories.fingerprint import fingerprint_policy
from ..trajectories.trajectory import TrajectoryBatch
from ..utils import whole_file
from .orders import DecodingOrder, finished_batch, given_order, replay_confidence


def order_provenance(
    order: DecodingOrder,
    tokens_per_step: int,
    temperature: float,
    model: nn.Module | None,
    tokenizer: str,
    spec: DiffusionSpec,
) -> Provenance:
    """Provenance of trajectories whose order was chosen. The policy is `model` for `"confidence"`, otherwise unknown."""
    recorded = order == "confidence"
    settings = {
        "order": order,
        "tokens_per_step": tokens_per_step,
        "temperature": temperature if recorded else None,
        **({"tempered_confidence": False} if recorded else {}),  # which probabilities gave the order
    }
    return Provenance(fingerprint_policy(model) if recorded and model is not None else None, tokenizer, spec, settings)


def order_batches(
    batches: list[TrajectoryBatch],
    provenance: Provenance,
    model: nn.Module | None,
    seed: int,
    where: Callable[[int], str],
) -> list[TrajectoryBatch]:
    """Gives finished batches the order that `provenance` names. `where` takes the number of a response, and returns how an
    error names it."""
    order, tokens_per_step = provenance.decoding["order"], provenance.decoding["tokens_per_step"]
    if order == "confidence":
        if model is None:
            raise ValueError("`decoding_order='confidence'` needs a `model`, which gives the order. Pass one.")
        return replay_batches(model, batches, provenance.spec, provenance, where)
    ordered, begun = [], 0
    for batch in batches:
        seeds = [derive_seed(seed, begun + number) for number in range(len(batch))]
        ordered.append(given_order(batch, provenance.spec, order, tokens_per_step, seeds))
        begun += len(batch)
    return ordered


def with_orders(
    dataset: Dataset,
    spec: DiffusionSpec,
    decoding_order: DecodingOrder = "random",
    tokens_per_step: int = 1,
    temperature: float = 1.0,
    model: nn.Module | None = None,
    batch_size: int = 16,
    seed: int = 0,
) -> Dataset:
    """
    A trajectory dataset in which every response has an order. Rows whose order is known stay as they are.

    Args:
        dataset ([`~datasets.Dataset`]): stored responses.
        spec ([`DiffusionSpec`]): facts about the policy.
        decoding_order, tokens_per_step, temperature, model, batch_size, seed (*optional*): as for [`from_preferences`].

    Raises:
        ValueError: if `"confidence"` gets no model.
        FloatingPointError: naming the row, if the policy's log-probabilities of a response are NaN or infinite.
    """
    rows = dataset.to_list()
    places = [place for place, row in enumerate(rows) if is_unordered(json.loads(row["decoding"]))]
    if not places:
        return dataset
    responses = [(place, ids) for place in places for ids in completions_of(rows[place])]
    provenance = order_provenance(
        decoding_order, tokens_per_step, temperature, model, rows[places[0]]["tokenizer_fingerprint"], spec
    )
    parts = [responses[begin : begin + batch_size] for begin in range(0, len(responses), batch_size)]
    batches = [
        finished_batch([rows[place]["prompt_ids"] for place, _ in part], [ids for _, ids in part], spec)
        for part in parts
    ]
    ordered = order_batches(batches, provenance, model, seed, lambda number: f"Row {responses[number][0]}")
    recorded = decoding_order == "confidence"
    found = [row for batch in ordered for row in to_rows(batch, spec, 1, provenance, recorded)]
    begin = 0
    for place in places:
        count = len(rows[place]["canvas_lengths"])
        own = found[begin : begin + count]
        rows[place].update(
            {**own[0], **{name: [value[name][0] for value in own] for name in ("canvas_lengths", *EVENTS[:3])}}
        )
        rows[place]["event_logps"] = [value["event_logps"][0] for value in own] if recorded else None
        rows[place]["completion_lengths"] = [value["completion_lengths"][0] for value in own]
        begin += count
    return Dataset.from_list(rows, features=dataset.features)


def replay_batches(
    model: nn.Module,
    batches: list[TrajectoryBatch],
    spec: DiffusionSpec,
    provenance: Provenance,
    where: Callable[[int], str],
) -> list[TrajectoryBatch]:
    """
    Calls [`replay_confidence`] for every batch, with the settings of `provenance`, or reads its result from the cache.

    Raises:
        FloatingPointError: if a log-probability is NaN or infinite. `where` names the response in the message, by its number.
    """
    path = _cache_file(batches, provenance, _precision(model))
    if path is not None and path.exists():
        try:
            found = load_file(path)
            return [
                replace(batch, steps=found[f"steps_{number}"], logps=found[f"logps_{number}"])
                for number, batch in enumerate(batches)
            ]
        except (OSError, KeyError, SafetensorError):
            pass  # a damaged file is replaced
    tokens_per_step, temperature = provenance.decoding["tokens_per_step"], provenance.decoding["temperature"]
    replayed: list[TrajectoryBatch] = []
    for batch in tqdm(batches, desc="replaying", unit="batch"):
        try:
            replayed.append(replay_confidence(model, batch, spec, tokens_per_step, temperature).to("cpu"))
        except NonFiniteLogits as error:  # names the row of the dataset
            number = sum(map(len, replayed)) + error.row
            raise FloatingPointError(f"{where(number)}: {error.reason}") from error
    if path is not None:
        tensors = {f"steps_{number}": batch.steps for number, batch in enumerate(replayed)}
        tensors |= {f"logps_{number}": batch.logps for number, batch in enumerate(replayed)}
        with whole_file(path) as temporary:
            save_file(tensors, temporary)
    return replayed


def _precision(model: nn.Module) -> str:
    """The type in which a model computes under the present autocast, empty without one."""
    device = next(model.parameters()).device.type
    return str(torch.get_autocast_dtype(device)) if torch.is_autocast_enabled(device) else ""


def _cache_file(batches: list[TrajectoryBatch], provenance: Provenance, precision: str) -> Path | None:
    """The file of a replay. Its name is a digest of everything that the replay depends on. `None` if the cache of `datasets` is
    off."""
    if not is_caching_enabled():
        return None
    digest = xxhash.xxh3_128(json.dumps(provenance.columns(), sort_keys=True).encode() + precision.encode())
    for batch in batches:
        for values in (batch.prompt_ids, batch.prompt_mask, batch.canvas_ids, batch.completion_lengths):
            digest.update(str(tuple(values.shape)).encode())
            digest.update(values.contiguous().numpy().data)
    return Path(datasets_config.HF_DATASETS_CACHE) / "trl_diffusion" / f"replay-{digest.hexdigest()}.safetensors"
